"""Saves an optimizer's state, and loads it into the optimizer of any parallel layout.

Each rank lists what it holds itself (`flat_shards`). Megatron's own `fully_reshardable` form has
the same names and shapes but gathers the whole fp32 state on every rank, for saving and for
loading, and its `fully_sharded_model_space` needs flattened ranges, which megatron-core 0.16
refuses. A checkpoint that was written in the first form is loaded like any other.

Parameter groups are not taken from a checkpoint: which parameters they hold and at what rates is in
the configuration, which a resumed run cannot change (options marked `FIXED`), and the current rates
come from the schedule. Only tensors and the number of updates are loaded.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_dlm.megatron_internals import allocate_state, held_states, synchronize_steps
from megatron_dlm.training.flat_shards import flat_shards


def _parts(built: MegatronOptimizer) -> list[Any]:
    return built.chained_optimizers if isinstance(built, ChainedOptimizer) else [built]


def sharded_optimizer_state(
    built: MegatronOptimizer, model_state: dict[str, Any], is_loading: bool
) -> dict[Any, Any]:
    """What this rank holds of an optimizer, for a distributed checkpoint.

    Args:
        built: The optimizer.
        model_state: The model's sharded state, with its data.
        is_loading: Whether the tensors are to be filled, within `loading_optimizer_state`; those
            of a distributed optimizer are filled in place.

    Returns:
        The state of the only optimizer, or those of a chain by number.
    """
    parameters = {
        value.data: value
        for value in nested_values(model_state)
        if isinstance(value, ShardedTensor | ShardedTensorFactory)
    }
    synchronize_steps(built)
    states = [
        _distributed_state(part, parameters)
        if isinstance(part, DistributedOptimizer)
        else part.sharded_state_dict(model_state, is_loading)
        for part in _parts(built)
    ]
    return states[0] if len(states) == 1 else dict(enumerate(states))


def _distributed_state(part: Any, parameters: dict[Any, Any]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for parameter, start, values in held_states(part):
        values.pop("step", None)  # one number for all, kept with the groups
        tensors[str(len(tensors))] = flat_shards(
            parameters[parameter],
            start,
            {f"optimizer.state.{name}": tensor for name, tensor in values.items()},
        )
    return {**part.state_dict(), "param_state": tensors}


def _part_states(state: Any) -> list[dict[str, Any]]:
    """The states of the optimizers in a chain, or of the only one."""
    if isinstance(state, list):
        return state
    chained = sorted(key for key in state if isinstance(key, int))
    return [state[key] for key in chained] or [state]


@contextmanager
def loading_optimizer_state(built: MegatronOptimizer) -> Iterator[None]:
    """Make a new optimizer ready to be loaded; surrounds listing what to load and loading it.

    Two things stand in the way. Megatron's distributed optimizer reads the step count of PyTorch's
    AdamW from its state when it lists what to load, before anything has allocated that state. And
    parameter groups are matched by multipliers of rate and decay, which groups with rates of their
    own have in common: meanwhile, a multiplier that nothing reads is the group's number.
    """
    for part in _parts(built):
        if isinstance(part, DistributedOptimizer) and not part.optimizer.state:
            allocate_state(part)
    multipliers = [group["lr_mult"] for group in built.param_groups]
    for number, group in enumerate(built.param_groups):
        group["lr_mult"] = number
    try:
        yield
    finally:
        for group, multiplier in zip(built.param_groups, multipliers, strict=True):
            group["lr_mult"] = multiplier


def _update_count(state: Any) -> Any:
    """The number of updates in a saved optimizer state; all parameters share it."""
    if isinstance(state, dict):
        for key in ("common_step", "step"):
            if key in state:
                return state[key]
    values = state.values() if isinstance(state, dict) else state
    for value in values if isinstance(state, dict | list) else ():
        count = _update_count(value)
        if count is not None:
            return count
    return None


def _fit_to_layout(loaded: dict[Any, Any], saved: Any, current: Any) -> list[dict[str, Any]]:
    """Arrange the loaded state in this layout's chain of optimizers and groups.

    Under expert parallelism Megatron chains an optimizer for the experts to that for the rest. The
    tensors have the same names either way, but groups and step counts are listed by optimizer.

    Args:
        loaded: The state as loaded into this layout's structure; changed in place.
        saved: The checkpoint's entries for the optimizer, without tensors.
        current: The state of this layout's optimizer.

    Returns:
        The states of the optimizers in the chain.
    """
    needed = _part_states(current)
    for key in [key for key in loaded if isinstance(key, int) != (len(needed) > 1)]:
        del loaded[key]
    count = _update_count(saved)
    parts = _part_states(loaded)
    for part, own in zip(parts, needed, strict=True):
        for key, value in _part_states(saved)[0].items():
            part.setdefault(key, copy.deepcopy(value))
        part, own = part.get("optimizer", part), own.get("optimizer", own)
        part["param_groups"] = own["param_groups"]
        if "state" in part:
            part["state"]["common_step"] = count
        else:  # the distributed optimizer keeps tensors elsewhere and the count with the groups
            for group in part["param_groups"]:
                group["step"] = count
    return parts


def _load_part(part: Any, state: dict[str, Any]) -> None:
    if not isinstance(part, DistributedOptimizer):
        part.load_state_dict(state)
        return
    state.pop("param_state")  # already in place
    part.load_state_dict(state)
    for values in part.optimizer.state.values():
        if "step" in values:  # PyTorch's AdamW now counts in one tensor that all parameters share
            values["step"] = values["step"].clone()


@torch.no_grad()
def load_optimizer_state(built: MegatronOptimizer, loaded: dict[Any, Any], saved: Any) -> None:
    """Load an optimizer from a checkpoint, within `loading_optimizer_state`.

    Args:
        built: This layout's optimizer.
        loaded: Its sharded state dict, loaded; used up.
        saved: The checkpoint's entries for the optimizer, without tensors.
    """
    states = _fit_to_layout(loaded, saved, built.state_dict())
    for part, state in zip(_parts(built), states, strict=True):
        _load_part(part, state)
    synchronize_steps(built)
