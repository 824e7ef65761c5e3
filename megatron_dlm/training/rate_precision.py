"""Learning rates whose updates are too small for bf16 weights (RND1's 1e-8 for most groups).

Under `--bf16` the optimizer updates float32 master weights, so nothing is lost in training. But the
bf16 copies used in forwards and exports hold a weight w in steps of about |w| / 256: if the master
has changed by less than half of that, they still have the initial value. Adapters lose nothing
until they are merged into such weights.
"""

import math

from megatron_dlm.config import Config
from megatron_dlm.config.fields import option_fields
from megatron_dlm.models.architecture import Architecture
from megatron_dlm.training.optimizer import DEFAULT_GROUP

HALF_STEP = 2.0**-9
"""Smallest relative change that can round a bf16 number to another one."""


def unseen_in_bf16(config: Config, architecture: Architecture) -> list[str]:
    """Warnings, one for each parameter group whose updates bf16 weights would round away.

    An Adam update is about as large as the learning rate, its sign close to random: n of them move
    a weight by about lr * sqrt(n), which is compared with a weight of the usual size. For adapters
    this is the change of B; the weight they are merged into changes by (alpha / r) B A.

    Args:
        config: The run's configuration.
        architecture: The model's; its `initializer_range` is the standard deviation of weights.
    """
    usual, scale, moved = architecture.initializer_range, 1.0, "a weight"
    where = "float32 master weights keep it, bf16 weights and exports do not"
    rank = config.lora.lora_rank
    if rank is not None:
        # r products of an entry of B with one of A, which is uniform in +-1 / sqrt(inputs)
        size_of_a = 1 / math.sqrt(3 * architecture.hidden_size)
        scale = (config.lora.lora_alpha or rank) / rank * math.sqrt(rank) * size_of_a
        moved, where = "a merged weight", "the adapters keep it, bf16 exports do not"
    rates = {group.pattern: group.lr for group in config.param_groups}
    warnings = []
    for name, given in {DEFAULT_GROUP: None, **rates}.items():
        lr = config.lr_scale * (config.optimizer.lr if given is None else given)
        drift = lr * math.sqrt(config.train_iters) * scale
        if 0 < drift < HALF_STEP * usual:
            warnings.append(
                f"warning: parameter group {name}: {config.train_iters} updates at {lr:g} move "
                f"{moved} by about {drift:.1g}, less than bf16 shows at {usual:g}; {where}"
            )
    return warnings


def config_of_run(saved: dict[str, object]) -> Config:
    """The configuration in a checkpoint, without options that this version does not have."""
    known = option_fields(Config)
    return Config.from_dict({name: value for name, value in saved.items() if name in known})
