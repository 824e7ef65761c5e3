"""Rules across values that depend neither on the model nor on the number of processes."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from megatron_dlm.config.divergence_spec import DivergenceSpec
from megatron_dlm.config.fields import OptionField, flag_of, option_fields
from megatron_dlm.config.rules.registry import Stage, rule
from megatron_dlm.config.rules.support import default_of, divisors, refuse, value_of
from megatron_dlm.config.schema import Config
from megatron_dlm.errors import bad_value
from megatron_dlm.extras import check_installed
from megatron_dlm.rollout.strategies import STRATEGIES


@rule(Stage.VALUES, "training", "inference")
def check_ranges(config: Config) -> None:
    """Every number lies in the range that its field states."""
    for name, option in option_fields(Config).items():
        _check_range(flag_of(name), option, value_of(config, name))


def _check_range(where: str, option: OptionField, value: Any) -> None:
    """The same of one option: a number, each number of a mapping, or each field of each record."""
    if isinstance(value, tuple):
        for i, record in enumerate(value):
            for name, field in option_fields(type(record)).items() if is_dataclass(record) else ():
                _check_range(f"{where}[{i}].{name}", field, getattr(record, name))
    elif isinstance(value, dict) and option.range is not None:
        for key, number in value.items():
            _check_range(f"{where}.{key}", option, number)
    elif option.range is not None and value is not None and value not in option.range:
        raise bad_value(where, value, option.range.problem, option.range.remedy)


@rule(Stage.COMBINATIONS)
def check_strategy_option(config: Config) -> None:
    """A strategy that keeps equal shares of a block divides it without a remainder."""
    block_size, strategy = config.model.block_size, STRATEGIES[config.rollout.remasking_strategy]
    if strategy.option is None:
        return
    if not strategy.fits_block(value_of(config, strategy.option.name), block_size):
        raise refuse(
            config,
            strategy.option.name,
            f"does not divide --block-size {block_size}",
            f"choose {divisors(block_size)}",
        )


@rule(Stage.COMBINATIONS)
def check_response_length_schedule(config: Config) -> None:
    """A growing response limit has a start, an end above it, and a duration."""
    rollout = config.rollout
    if rollout.response_length_schedule == "constant":
        return
    start, end = rollout.min_response_length, rollout.max_response_length
    schedule = f"--response-length-schedule {rollout.response_length_schedule}"
    if start is None:
        raise refuse(
            config, "min_response_length", f"{schedule} needs a start", f"choose 1 to {end}"
        )
    if start > end:
        raise refuse(
            config,
            "min_response_length",
            f"is above --max-response-length {end}",
            f"choose {end} or less",
        )
    if rollout.response_length_warmup_rollouts < 1:
        raise refuse(
            config,
            "response_length_warmup_rollouts",
            f"{schedule} needs a duration",
            "choose 1 or more, or the schedule constant",
        )


@rule(Stage.LENGTH)
def check_dynamic_threshold_schedule(config: Config) -> None:
    """A threshold that changes has an end, and rollouts in which it does."""
    rollout = config.rollout
    if rollout.dynamic_threshold_schedule == "constant":
        return
    if rollout.final_dynamic_threshold is None:
        raise refuse(
            config,
            "final_dynamic_threshold",
            f"--dynamic-threshold-schedule {rollout.dynamic_threshold_schedule} needs an end",
            "choose e.g. 0.7",
        )
    hold, rollouts = rollout.dynamic_threshold_hold_rollouts, config.num_rollouts
    if rollouts and hold >= rollouts:  # 0: epochs of data that have not been read
        raise refuse(
            config,
            "dynamic_threshold_hold_rollouts",
            f"leaves none of the {rollouts} rollouts for the schedule",
            f"choose less than {rollouts}",
        )


@rule(Stage.VALUES)
def check_divergence(config: Config) -> None:
    """The divergence is one that can be computed."""
    DivergenceSpec.parse(config.distillation.divergence)


@rule(Stage.COMBINATIONS)
def check_learning_rates(config: Config) -> None:
    """The learning rate decays downwards."""
    optimizer = config.optimizer
    if optimizer.lr_decay_style != "constant" and optimizer.min_lr > optimizer.lr:
        raise refuse(
            config,
            "min_lr",
            f"is above --lr {optimizer.lr:g}",
            f"choose 0 to {optimizer.lr:g}, or --lr-decay-style constant",
        )


@rule(Stage.COMBINATIONS)
def check_parameter_groups(config: Config) -> None:
    """Each parameter group has a pattern of its own and settings like the global ones."""
    optimizer = config.optimizer
    if optimizer.param_group_preset is not None and optimizer.param_groups:
        raise refuse(
            config,
            "param_group_preset",
            "stands for parameter groups, and --param-groups names others",
            "leave one of the two out",
        )
    patterns: set[str] = set()
    for i, group in enumerate(optimizer.param_groups):
        where = f"{flag_of('param_groups')}[{i}]"
        try:
            re.compile(group.pattern)
        except re.error as error:
            raise bad_value(
                f"{where}.pattern",
                group.pattern,
                f"is not a regular expression ({error})",
                "escape special characters with a backslash",
            ) from None
        if group.pattern in patterns:
            raise bad_value(
                f"{where}.pattern", group.pattern, "is given twice", "merge the two groups"
            )
        patterns.add(group.pattern)
        lr = optimizer.lr if group.lr is None else group.lr
        min_lr = optimizer.min_lr if group.min_lr is None else group.min_lr
        if optimizer.lr_decay_style != "constant" and min_lr > lr:
            raise bad_value(
                f"{where}.min_lr", min_lr, f"is above the group's lr {lr:g}", f"choose 0 to {lr:g}"
            )


@rule(Stage.COMBINATIONS, "training", "inference")
def check_sequence_parallel(config: Config) -> None:
    """Sequence parallelism splits over the tensor-parallel processes, so there must be several."""
    if config.parallel.sequence_parallel and config.parallel.tensor_model_parallel_size == 1:
        raise refuse(
            config,
            "sequence_parallel",
            "has nothing to split over with --tensor-model-parallel-size 1",
            "write --no-sequence-parallel or choose a tensor-parallel size of 2 or more",
        )


@rule(Stage.COMBINATIONS)
def check_attention_backend(config: Config) -> None:
    """FlexAttention has no backward pass on CPU."""
    if config.model.attention_backend != "flex":
        return
    if config.parallel.device == "cpu" or (config.parallel.device == "auto" and not _has_cuda()):
        raise refuse(
            config, "attention_backend", "cannot train on CPU", "choose sdpa or auto, or use CUDA"
        )


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@rule(Stage.COMBINATIONS)
def check_optional_packages(config: Config) -> None:
    """Packages that options need are installed."""
    if config.model.transformer_impl == "transformer_engine" and not _is_installed(
        "transformer_engine"
    ):
        raise refuse(
            config,
            "transformer_impl",
            "the package transformer_engine is not installed",
            "install it (CUDA only) or choose local",
        )
    if config.parallel.moe_token_dispatcher_type == "flex" and not _is_installed("deep_ep"):
        raise refuse(
            config,
            "moe_token_dispatcher_type",
            "the package deep_ep is not installed",
            "install DeepEP (CUDA only) or choose alltoall",
        )
    if config.logging.wandb_project is not None:
        check_installed("wandb", "--wandb-project", config.logging.wandb_project)


@rule(Stage.COMBINATIONS)
def check_save(config: Config) -> None:
    """Checkpoints have a folder."""
    logging = config.logging
    if logging.save is None:
        of_a_folder = (
            "save_interval",
            "save_interval_minutes",
            "keep_checkpoints",
            "wandb_project",
        )
        for name in of_a_folder:
            if value_of(config, name) != default_of(name):
                raise refuse(config, name, "there is no run folder", "add --save")
        return
    folder = Path(logging.save)
    if folder.exists() and not folder.is_dir():
        raise refuse(config, "save", "is a file", "name a folder")


@rule(Stage.COMBINATIONS)
def check_on_divergence(config: Config) -> None:
    """The run is told to end, or how many updates it may leave out."""
    value = config.training.on_divergence
    if value != "stop" and re.fullmatch(r"skip:[1-9]\d{0,8}", value) is None:
        raise refuse(config, "on_divergence", "is neither stop nor skip:N", "choose e.g. skip:3")


@rule(Stage.LENGTH)
def check_schedule_length(config: Config) -> None:
    """The warm-up is given only once and ends before the decay does."""
    if config.lr_decay_iters == 0:
        return  # epochs of data that have not been read yet: checked again after reading
    warmup, decay = config.lr_warmup_iters, config.lr_decay_iters
    by_fraction = config.optimizer.lr_warmup_fraction is not None
    if by_fraction and config.optimizer.lr_warmup_iters:
        raise refuse(
            config,
            "lr_warmup_fraction",
            f"--lr-warmup-iters {config.optimizer.lr_warmup_iters} is given too",
            "leave one of the two out",
        )
    if warmup >= decay:
        raise refuse(
            config,
            "lr_warmup_fraction" if by_fraction else "lr_warmup_iters",
            f"is not below the end of the decay at step {decay}",
            "choose less than 1"
            if by_fraction
            else f"choose 0 to {decay - 1}, or a larger --lr-decay-iters",
        )
