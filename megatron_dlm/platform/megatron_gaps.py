"""What Megatron-Core 0.16 leaves undefined or too coarse, on every device.

The only place where its private names are touched, apart from the CPU stand-ins of `platform.cpu`.
"""

import functools

from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    distrib_optimizer,
    optimizer,
)
from megatron.core.transformer.moe import moe_utils
from torch import Tensor


def define_missing_gemm() -> None:
    """Let mixtures of experts run without Transformer Engine.

    The router asks whether `te_general_gemm` is None, but the name exists only where Transformer
    Engine is installed.
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def identify_param_groups_by_name() -> None:
    """Let a checkpoint's parameter groups be told apart by our `name`.

    Megatron matches them by multipliers of weight decay and learning rate alone, which groups with
    rates of their own have in common.
    """
    for module in (optimizer, distrib_optimizer):
        if "name" not in module.param_group_identifier_keys:
            module.param_group_identifier_keys = (*module.param_group_identifier_keys, "name")


def prepare_optimizer_to_load(built: MegatronOptimizer) -> None:
    """Let a distributed optimizer over PyTorch's AdamW be loaded from a checkpoint.

    Megatron allows for the step count that AdamW keeps with each parameter's state when it saves,
    but not when it loads: it reads the count from a state that a new optimizer has not allocated
    yet, shares the restored count between parameters, and misses it among the loaded tensors.
    """
    parts = built.chained_optimizers if isinstance(built, ChainedOptimizer) else [built]
    for part in parts:
        if isinstance(part, distrib_optimizer.DistributedOptimizer):
            if not part.optimizer.state:
                part._init_optimizer_states_with_dummy_values()
            part._set_main_param_and_optimizer_states = functools.partial(_set_with_step, part)


def _set_with_step(
    part: distrib_optimizer.DistributedOptimizer, model_param: Tensor, tensors: dict[str, Tensor]
) -> None:
    group_index, group_order = part.model_param_group_index_map[model_param]
    main_param = part.optimizer.param_groups[group_index]["params"][group_order]
    state = part.optimizer.state[main_param]
    if "step" in state:
        # Restored as one tensor for all parameters, each of which would then count it up.
        state["step"] = state["step"].clone()
        tensors = {"step": state["step"], **tensors}
    type(part)._set_main_param_and_optimizer_states(part, model_param, tensors)
