"""Which options a run reads: one that it has no use for has to keep its default.

An option counts as set where it differs from its default, whether a flag or a YAML file says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dlm.config.rules.registry import Stage, rule
from megatron_dlm.config.rules.support import default_of, flag, refuse, value_of
from megatron_dlm.config.schema import Config, SelfDistillationConfig
from megatron_dlm.rollout.decoding_options import STRATEGY_OPTIONS
from megatron_dlm.rollout.strategies import STRATEGIES
from megatron_dlm.types.diffusion_kind import BLOCK_DIFFUSION

DIVERGENCE_FIELDS = ("divergence", "jsd_beta", "divergence_top_k", "divergence_tail")


@dataclass(frozen=True)
class Use:
    """A condition under which some options are read.

    Attributes:
        condition: Whether they are read.
        names: Fields of the options.
        reason: What has no use for them where they are not.
        remedy: What would use them, as an imperative; empty if nothing but another run would.
    """

    condition: bool
    names: tuple[str, ...]
    reason: str
    remedy: str = ""


def uses(config: Config) -> tuple[Use, ...]:
    """The conditions of a configuration; an option in several of them is read where all hold."""
    return (*_uses_of_objective(config), *_uses_of_other_options(config))


def is_used(config: Config, name: str) -> bool:
    """Whether the run reads an option."""
    return all(use.condition for use in uses(config) if name in use.names)


@rule(Stage.USAGE)
def check_nothing_is_ignored(config: Config) -> None:
    """What the run has no use for keeps its default."""
    for use in uses(config):
        for name in use.names if not use.condition else ():
            if value_of(config, name) != default_of(name):
                remedy = f"drop {flag(name)}" + (f", or {use.remedy}" if use.remedy else "")
                raise refuse(config, name, f"{use.reason} has no use for it", remedy)


def _uses_of_objective(config: Config) -> list[Use]:
    """What hangs on the objective and on where its responses come from."""
    traits, source, rollouts = config.traits, config.response_source, config.uses_rollouts
    corpus, itself = source == "corpus", traits.self_distillation
    generates = rollouts or config.uses_teacher_responses
    block_diffusion = traits.diffusion_kind == BLOCK_DIFFUSION
    by_blocks = rollouts or block_diffusion
    # A given response has no visited states, and a corpus window no blocks.
    masks_at_random = block_diffusion and (
        config.state_selection == "random" or config.uses_teacher_responses
    )
    of_rollouts = (
        "num_rollouts",
        "rollout_batch_size",
        "epochs_per_rollout",
        "response_length_schedule",
        "min_response_length",
        "response_length_warmup_rollouts",
        "dynamic_threshold_schedule",
        "remasking_strategy",
        *STRATEGY_OPTIONS,
    )
    of_records = (
        "max_prompt_length",
        "long_prompts",
        "max_response_length",
        "max_response_length_by_domain",
        "prompt_suffix_by_domain",
        "chat_template_kwargs",
    )
    of_mixtures = (
        "teacher_response_fraction",
        "final_teacher_response_fraction",
        "teacher_response_fraction_schedule",
        "teacher_response_fraction_rollouts",
    )
    rows: tuple[tuple[bool, tuple[str, ...]], ...] = (
        (source in ("rollout", "teacher"), ("prompts",)),
        (source == "data", ("train_data", "train_on")),
        (corpus, ("data_path", "seq_length")),
        (not corpus, of_records),
        (not corpus and not itself, ("supervise_eos",)),
        (by_blocks, ("block_size",)),
        (generates, ("temperature", "top_k", "top_p", "max_running_requests")),
        (rollouts, of_rollouts),
        (rollouts and not itself, of_mixtures),
        (not rollouts, ("train_iters",)),
        (config.validation_path is not None, ("eval_interval", "eval_iters")),
        (traits.weighs_tokens, ("loss_weighting",)),
        (masks_at_random, ("empty_mask",)),
        (traits.chooses_attention, ("attention_pattern", "attention_annealing_iters")),
        (traits.diffusion_kind is not None, ("mask_embedding_init",)),
        (config.needs_teacher, ("teacher_load",)),
        (config.uses_teacher_responses, ("teacher_responses",)),
        (traits.uses_teacher, ("offload_teacher", "offload_optimizer")),
        (traits.uses_teacher, ("cache_teacher_targets", *DIVERGENCE_FIELDS)),
    )
    objective = _as_given(config, "objective")
    return [
        *(Use(condition, names, objective) for condition, names in rows),
        Use(
            not itself,
            DIVERGENCE_FIELDS,
            objective,
            f"use {flag('teacher_top_k')} or {flag('divergence_term_limit')}",
        ),
        Use(
            itself,
            tuple(SelfDistillationConfig.__dataclass_fields__),
            objective,
            "choose --objective d_opsd",
        ),
        Use(traits.verifies, ("reward", "max_tries"), objective, "choose --objective d_opsd"),
    ]


def _uses_of_other_options(config: Config) -> list[Use]:
    """What hangs on another option."""
    rollout, distillation = config.rollout, config.distillation

    def choose(name: str, *values: str) -> str:
        return f"choose {flag(name)} {' or '.join(values)}"

    return [
        *(
            Use(
                STRATEGIES[rollout.remasking_strategy].option == option,
                (name,),
                _as_given(config, "remasking_strategy"),
                choose(
                    "remasking_strategy",
                    *(
                        strategy.name
                        for strategy in STRATEGIES.values()
                        if strategy.option == option
                    ),
                ),
            )
            for name, option in STRATEGY_OPTIONS.items()
        ),
        Use(
            config.objective.attention_pattern != "causal",
            ("attention_annealing_iters",),
            "--attention-pattern causal",
            choose("attention_pattern", "full"),
        ),
        Use(
            rollout.temperature > 0,
            ("top_k", "top_p"),
            "--temperature 0",
            "choose a temperature above 0",
        ),
        Use(
            rollout.response_length_schedule != "constant",
            ("min_response_length", "response_length_warmup_rollouts"),
            "--response-length-schedule constant",
            choose("response_length_schedule", "linear", "cosine"),
        ),
        Use(
            bool(rollout.max_response_length_by_domain or config.data.prompt_suffix_by_domain),
            ("domain_field",),
            "a run without options by domain",
            "add --max-response-length-by-domain",
        ),
        Use(
            rollout.dynamic_threshold_schedule != "constant",
            (
                "final_dynamic_threshold",
                "dynamic_threshold_hold_rollouts",
                "dynamic_threshold_rollouts",
            ),
            "--dynamic-threshold-schedule constant",
            choose("dynamic_threshold_schedule", "linear", "cosine"),
        ),
        Use(
            rollout.remasking_strategy == "low_confidence_dynamic",
            ("dynamic_threshold_schedule",),
            _as_given(config, "remasking_strategy"),
            choose("remasking_strategy", "low_confidence_dynamic"),
        ),
        Use(
            rollout.teacher_response_fraction_schedule != "constant",
            ("final_teacher_response_fraction", "teacher_response_fraction_rollouts"),
            "--teacher-response-fraction-schedule constant",
            choose("teacher_response_fraction_schedule", "linear", "cosine"),
        ),
        Use(
            config.uses_teacher_responses,
            ("teacher_response_fraction_schedule",),
            "--teacher-response-fraction 0",
            "choose a fraction above 0",
        ),
        Use(
            "jsd" in distillation.divergence,
            ("jsd_beta",),
            _as_given(config, "divergence"),
            choose("divergence", "jsd"),
        ),
        Use(
            distillation.divergence_top_k > 0,
            ("divergence_tail",),
            "--divergence-top-k 0",
            "choose e.g. --divergence-top-k 16",
        ),
        Use(
            config.logging.keep_checkpoints > 0,
            ("keep_checkpoint_every",),
            "--keep-checkpoints 0",
            "choose e.g. --keep-checkpoints 3",
        ),
        Use(
            config.lora.lora_rank is not None,
            ("lora_alpha", "lora_dropout", "lora_target_modules"),
            "training without adapters",
            "add --lora-rank",
        ),
        Use(
            config.model.recompute_granularity == "full",
            ("recompute_method", "recompute_num_layers"),
            _as_given(config, "recompute_granularity"),
            choose("recompute_granularity", "full"),
        ),
        Use(
            config.optimizer.lr_decay_style != "constant",
            ("min_lr",),
            "--lr-decay-style constant",
            choose("lr_decay_style", "cosine", "linear"),
        ),
        *(
            Use(
                not _groups_cover(config, name),
                (name,),
                "--param-groups"
                if config.optimizer.param_group_preset is None
                else _as_given(config, "param_group_preset"),
                f"choose --param-groups of which one names no {name}",
            )
            for name in ("lr", "min_lr", "weight_decay")
        ),
    ]


def _groups_cover(config: Config, name: str) -> bool:
    """Whether every parameter is in a group with its own value of an optimizer's setting."""
    groups = config.param_groups
    everything = any(group.pattern == "default" for group in groups)
    return everything and all(getattr(group, name) is not None for group in groups)


def _as_given(config: Config, name: str) -> str:
    """An option and its value as on the command line."""
    return f"{flag(name)} {value_of(config, name)}"
