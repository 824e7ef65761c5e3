"""Megatron's optimizer and schedule, with parameter groups chosen by name.

Each group has its own peak and minimum learning rate and weight decay (RND1 section 4.2: 3e-4 for
attention, 1e-8 for everything else).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_dlm.config import Config, ParameterGroup
from megatron_dlm.errors import bad_value
from megatron_dlm.megatron_internals import adam_is_torch
from megatron_dlm.models.model_parameters import global_names
from megatron_dlm.training.multi_tensor import install_multi_tensor

GROUPS = {
    "attention": r"\.self_attention\.linear_(qkv|proj)\.(weight|bias|lora_[ab])$",
    "mlp": r"\.mlp\.linear_fc[12]\.(weight|lora_[ab])$",
    "experts": r"\.mlp\.experts\.",
    "router": r"\.mlp\.router\.",
    "embedding": r"(^|\.)embedding\.",
    "norm": r"(layernorm\.weight|layer_norm_weight)$",
    "output": r"(^|\.)output_layer\.",
}
"""Named groups of parameters and the names they stand for; no two share a parameter."""

DEFAULT_GROUP = "default"
"""Name of the group of all parameters that are in no other."""


def _pattern(group: ParameterGroup) -> re.Pattern[str]:
    try:
        return re.compile(GROUPS.get(group.pattern, group.pattern))
    except re.error as error:
        raise bad_value(
            "param_groups: pattern",
            group.pattern,
            f"is neither a named group nor a regular expression ({error})",
            f"use one of {', '.join(GROUPS)} or a valid expression",
        ) from error


def check_groups(groups: Sequence[ParameterGroup], local_names: Sequence[str]) -> None:
    """Check that every group matches a parameter on some rank and no parameter is in two groups.

    Args:
        groups: The configured groups.
        local_names: Names of this rank's trainable parameters in the whole model.

    Raises:
        UserError: A pattern matches nothing on any rank, or two patterns match the same parameter.
    """
    groups = [group for group in groups if group.pattern != DEFAULT_GROUP]
    if not groups:
        return
    patterns = [_pattern(group) for group in groups]
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, list(local_names))
    names = sorted({name for rank_names in every for name in rank_names})
    for group, pattern in zip(groups, patterns, strict=True):
        if not any(pattern.search(name) for name in names):
            raise bad_value(
                "param_groups: pattern",
                group.pattern,
                "matches no parameter of the model on any rank",
                f"use one of {', '.join(GROUPS)} or an expression over names such as {names[0]}",
            )
    for name in names:
        matching = [
            group.pattern
            for group, pattern in zip(groups, patterns, strict=True)
            if pattern.search(name)
        ]
        if len(matching) > 1:
            raise bad_value(
                "param_groups: pattern",
                matching,
                f"both match {name}",
                "make the patterns disjoint",
            )


def _overrides(
    config: Config, optimizer_config: OptimizerConfig, names: Mapping[Tensor, str]
) -> dict[ParamKey, Any]:
    # Megatron's own rules come first: no weight decay on norms and biases.
    overrides: dict[ParamKey, Any] = get_standard_config_overrides(optimizer_config)
    groups = {group.pattern: group for group in config.param_groups}
    rest = groups.pop(DEFAULT_GROUP, ParameterGroup(DEFAULT_GROUP))
    patterns = [_pattern(group) for group in groups.values()]
    # One kernel for all parameters, as the libraries have it.
    fused = {"fused": True} if optimizer_config.optimizer == "adam" and adam_is_torch() else {}

    def in_no_group(parameter: Tensor, _: str) -> bool:
        return not any(pattern.search(names[parameter]) for pattern in patterns)

    def add(group: ParameterGroup, predicate: Callable[[Tensor, str], bool]) -> None:
        override: dict[str, Any] = {"name": group.pattern, **fused}
        if group.lr is not None:
            override["max_lr"] = config.lr_scale * group.lr
            override["min_lr"] = config.lr_scale * min(config.optimizer.min_lr, group.lr)
        if group.min_lr is not None:
            override["min_lr"] = config.lr_scale * group.min_lr
        if group.weight_decay is not None:
            override["start_wd"] = override["end_wd"] = group.weight_decay
        named = ParamWithNamePredicate(name=group.pattern, fn=predicate)
        overrides[ParamKey(with_name_predicate=named)] = override

    add(rest, in_no_group)
    for group, pattern in zip(groups.values(), patterns, strict=True):

        def matches(parameter: Tensor, _: str, pattern: re.Pattern[str] = pattern) -> bool:
            return pattern.search(names[parameter]) is not None

        add(group, matches)
    return overrides


def build_optimizer(
    config: Config, model: torch.nn.Module, wrapped: Sequence[torch.nn.Module]
) -> MegatronOptimizer:
    """Build Megatron's optimizer for a model.

    Args:
        config: Of the run.
        model: This rank's part.
        wrapped: Its chunks, wrapped in DDP.

    Raises:
        UserError: See `check_groups`.
    """
    options = config.optimizer
    names = global_names(model)
    check_groups(
        config.param_groups,
        [name for parameter, name in names.items() if parameter.requires_grad],
    )
    optimizer_config = OptimizerConfig(
        optimizer=options.optimizer,
        lr=config.lr_scale * options.lr,
        min_lr=config.lr_scale * options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=config.model.bf16,
        params_dtype=torch.bfloat16 if config.model.bf16 else torch.float32,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    install_multi_tensor()
    return get_megatron_optimizer(
        optimizer_config,
        list(wrapped),
        config_overrides=_overrides(config, optimizer_config, names),
        use_gloo_process_groups=False,
    )


def build_scheduler(config: Config, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Build Megatron's learning-rate schedule, counted in optimizer updates.

    A checkpoint says only how many updates are done: the rest is the configuration's, which has
    been compared with what the run was started with.
    """
    options = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr_scale * options.lr,
        # A constant schedule may stay below the end that a decay would have; Megatron checks it.
        min_lr=config.lr_scale * min(options.min_lr, options.lr),
        lr_warmup_steps=config.lr_warmup_iters,
        lr_decay_steps=config.lr_decay_iters,
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=config.lr_decay_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def learning_rates(optimizer: MegatronOptimizer) -> dict[str, float]:
    """Current learning rate of each named group; parameters in none are the `default` group."""
    return {group["name"]: float(group["lr"]) for group in optimizer.param_groups}
