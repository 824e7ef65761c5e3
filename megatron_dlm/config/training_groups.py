"""Options of the optimizer, the length of a run and its logging; see `groups`."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, StrictFloat

from megatron_dlm.config.marks import (
    ABOVE_ZERO,
    AT_LEAST_ONE,
    AT_LEAST_ZERO,
    BELOW_ONE,
    FIXED,
    FRACTION,
    Text,
)

ParamGroupPreset = Literal["rnd1"]


@dataclass(frozen=True)
class ParameterGroup:
    """Settings of the optimizer for the parameters that a pattern matches.

    Attributes:
        pattern: attention, mlp, experts, router, embedding, norm, output, default (all that is in
            no other group), or a regular expression searched in the parameter's name in the whole
            model, which no layout changes. A pattern that matches nothing is an error.
        lr: Peak learning rate, 0 for parameters that stay (None: `--lr`).
        min_lr: Learning rate at the end of the decay (None: `--min-lr`).
        weight_decay: Weight decay (None: `--weight-decay`).
    """

    __pydantic_config__: ClassVar = ConfigDict(
        extra="forbid", allow_inf_nan=False, revalidate_instances="always"
    )
    pattern: Text
    lr: Annotated[StrictFloat | None, AT_LEAST_ZERO] = None
    min_lr: Annotated[StrictFloat | None, AT_LEAST_ZERO] = None
    weight_decay: Annotated[StrictFloat | None, AT_LEAST_ZERO] = None


PARAM_GROUP_PRESETS: dict[ParamGroupPreset, tuple[ParameterGroup, ...]] = {
    # RND1 section 4.2, setting 4. Its schedule is constant; with another one, rates decay to 0.
    "rnd1": (
        ParameterGroup("attention", lr=3e-4, min_lr=0.0, weight_decay=0.1),
        ParameterGroup("default", lr=1e-8, min_lr=0.0, weight_decay=0.1),
    ),
}
"""Parameter groups that publications trained with, by name (`--param-group-preset`)."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer: update rule, learning rates and their schedule."""

    optimizer: Annotated[Literal["adam"], FIXED] = "adam"
    """Update rule (adam is AdamW: decoupled weight decay)."""
    offload_optimizer: bool = False
    """Keep the optimizer's state and main weights in host memory, and free gradients, during
    rollouts and the teacher's forwards (without rollouts, those of every update)."""
    lr: Annotated[float, ABOVE_ZERO, FIXED] = 1e-5
    """Peak learning rate."""
    min_lr: Annotated[float, AT_LEAST_ZERO, FIXED] = 1e-6
    """Learning rate at the end of the decay; not used by a constant schedule."""
    lr_decay_style: Annotated[Literal["cosine", "linear", "constant"], FIXED] = "cosine"
    """Shape of the schedule after the warm-up."""
    lr_warmup_iters: Annotated[int, AT_LEAST_ZERO, FIXED] = 0
    """Optimizer steps over which the learning rate rises from 0 to --lr."""
    lr_warmup_fraction: Annotated[float | None, FRACTION] = None
    """The same as a fraction of --lr-decay-iters, instead of --lr-warmup-iters."""
    lr_decay_iters: Annotated[int | None, AT_LEAST_ONE, FIXED] = None
    """Optimizer step at which --min-lr is reached (default: the number of steps of the run)."""
    weight_decay: Annotated[float, AT_LEAST_ZERO, FIXED] = 0.0
    """Decoupled weight decay; never applied to norms and biases."""
    adam_beta1: Annotated[float, BELOW_ONE, FIXED] = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Annotated[float, BELOW_ONE, FIXED] = 0.999
    """Decay of Adam's second moment."""
    adam_eps: Annotated[float, ABOVE_ZERO, FIXED] = 1e-8
    """Term that keeps Adam's denominator above zero."""
    clip_grad: Annotated[float, AT_LEAST_ZERO] = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    param_groups: Annotated[tuple[ParameterGroup, ...], FIXED] = ()
    """Parameter groups with their own settings, a list of {pattern, lr, min_lr, weight_decay};
    JSON on the command line. Patterns: attention, mlp, experts, router, embedding, norm, output,
    default (what is in no other group), or a regular expression."""
    param_group_preset: ParamGroupPreset | None = None
    """Published parameter groups instead of --param-groups. rnd1: attention at a peak rate of 3e-4,
    everything else at 1e-8, weight decay 0.1 (meant for --lr-decay-style constant)."""


@dataclass(frozen=True)
class TrainingConfig:
    """Training: batch sizes and length of the run."""

    micro_batch_size: Annotated[int, AT_LEAST_ONE] = 1
    """Trajectories (or corpus windows) packed into one row, the unit of a forward pass."""
    max_tokens_per_micro_batch: Annotated[int | None, AT_LEAST_ONE] = None
    """Pack the trajectories of an update into rows of at most this many tokens, as few rows as
    possible, instead of --micro-batch-size; the teacher's rows too. Only what is longer by itself
    gets a longer row. Data-parallel processes share the update by cost."""
    global_batch_size: Annotated[int, AT_LEAST_ONE, FIXED] = 8
    """Trajectories (or corpus windows) per optimizer update, over all data-parallel processes."""
    train_iters: Annotated[int | None, AT_LEAST_ONE] = None
    """Optimizer steps of objectives without rollouts; the others derive it from --num-rollouts."""
    num_epochs: Annotated[int | None, AT_LEAST_ONE] = None
    """Passes over the data, instead of --num-rollouts or --train-iters; the last rollout or update
    takes the remaining samples (61,816 prompts at 128 a rollout: 483 rollouts, the last of 120)."""
    epochs_per_rollout: Annotated[int, AT_LEAST_ONE, FIXED] = 1
    """Passes over the trajectories of a rollout before the next one."""
    eval_interval: Annotated[int, AT_LEAST_ZERO] = 0
    """Optimizer steps between two validation losses, where held-out data are given; 0 takes one
    only, at the end of the run."""
    eval_iters: Annotated[int, AT_LEAST_ONE] = 10
    """Global batches of held-out data that a validation loss is taken over: always the same samples
    with the same masks."""
    exit_duration_in_mins: Annotated[float | None, ABOVE_ZERO] = None
    """Minutes from its start after which a run saves and ends as if it was sent SIGTERM: with
    status 75, to be started again."""
    on_divergence: str = "stop"
    """What becomes of a run whose loss or gradient is no finite number. stop: it ends with status
    3. skip:N: the update is left out, up to N times in a row."""


@dataclass(frozen=True)
class LoggingConfig:
    """Logging and checkpoints."""

    save: str | None = None
    """Run folder: checkpoints, metrics.jsonl, resolved configuration, TensorBoard."""
    save_interval: Annotated[int, AT_LEAST_ZERO] = 0
    """Optimizer steps between checkpoints, rounded up to the end of the rollout; 0 leaves it to
    --save-interval-minutes."""
    save_interval_minutes: Annotated[float, AT_LEAST_ZERO] = 30.0
    """Minutes after the last checkpoint from which on the next one is written, after an update or a
    rollout; 0 leaves it to --save-interval. The end of the run is always saved."""
    keep_checkpoints: Annotated[int, AT_LEAST_ZERO] = 0
    """Latest checkpoints to keep; 0 keeps all."""
    keep_checkpoint_every: Annotated[int, AT_LEAST_ZERO] = 0
    """Keep those whose iteration is a multiple of this too, with --keep-checkpoints; 0 keeps no
    others."""
    keep_best_checkpoint: bool = False
    """Keep the checkpoint with the lowest validation loss too, with --keep-checkpoints; the loss is
    then measured for every checkpoint."""
    async_save: bool = True
    """Train on while a checkpoint is written, from a copy in the host's memory; off, training waits
    and there is no copy."""
    measure_machine: bool = True
    """Measure the rate of matrix products and the memory bandwidth of a device when a run starts (a
    fraction of a second): what `mfu` and `rollout_floor_share` are shares of."""
    log_interval: Annotated[int, AT_LEAST_ONE] = 1
    """Optimizer steps between two lines of progress; metrics.jsonl has every step."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run folder."""
    wandb_project: str | None = None
    """Weights & Biases project to log to as well (wandb must be installed)."""
