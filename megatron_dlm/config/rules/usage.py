"""Options that a run uses: an unused one must keep its default.

An option counts as set if it differs from its default, by a flag or a YAML file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_dlm.config.fields import flag_of
from megatron_dlm.config.groups import SelfDistillationConfig
from megatron_dlm.config.rules.registry import Stage, rule
from megatron_dlm.config.rules.support import default_of, refuse, value_of
from megatron_dlm.config.schema import Config
from megatron_dlm.rollout.decoding_options import STRATEGY_OPTIONS
from megatron_dlm.rollout.strategies import STRATEGIES
from megatron_dlm.types.diffusion_kind import BLOCK_DIFFUSION

DIVERGENCE = "divergence jsd_beta divergence_top_k divergence_tail"


@dataclass(frozen=True)
class Use:
    """A condition under which some options are used.

    Attributes:
        condition: Whether they are read.
        names: Names of the options, with spaces between them.
        reason: What has no use for them where they are not.
        remedy: What would use them, as an imperative; empty if nothing but another run would.
    """

    condition: bool
    names: str
    reason: str
    remedy: str = ""


def uses(config: Config) -> tuple[Use, ...]:
    """The conditions of a configuration; an option in several of them is used if all hold."""
    return (*_uses_of_objective(config), *_uses_of_other_options(config))


def is_used(config: Config, name: str) -> bool:
    """Whether the run reads an option."""
    return all(use.condition for use in uses(config) if name in use.names.split())


@rule(Stage.USAGE)
def check_nothing_is_ignored(config: Config) -> None:
    """Unused options keep their defaults."""
    for use in uses(config):
        for name in use.names.split() if not use.condition else ():
            if value_of(config, name) != default_of(name):
                remedy = f"drop {flag_of(name)}" + (f", or {use.remedy}" if use.remedy else "")
                raise refuse(config, name, f"{use.reason} has no use for it", remedy)


def _uses_of_objective(config: Config) -> Iterator[Use]:
    """What hangs on the objective and on where its responses come from."""
    traits, source, rollouts = config.traits, config.response_source, config.uses_rollouts
    corpus, itself = source == "corpus", traits.self_distillation
    generates = rollouts or config.uses_teacher_responses
    block_diffusion = traits.diffusion_kind == BLOCK_DIFFUSION
    # A given response has no visited states, and a corpus window no blocks.
    masks_at_random = block_diffusion and (
        config.state_selection == "random" or config.uses_teacher_responses
    )
    objective = _as_given(config, "objective")
    for condition, names in (
        (source in ("rollout", "teacher"), "prompts"),
        (source == "data", "train_data train_on"),
        (corpus, "data_path seq_length"),
        (
            not corpus,
            "max_prompt_length long_prompts max_response_length max_response_length_by_domain "
            "prompt_suffix_by_domain chat_template_kwargs",
        ),
        (not corpus and not itself, "supervise_eos"),
        (rollouts or block_diffusion, "block_size"),
        (generates, "temperature top_k top_p max_running_requests"),
        (
            rollouts,
            "num_rollouts rollout_batch_size epochs_per_rollout response_length_schedule "
            "min_response_length response_length_warmup_rollouts dynamic_threshold_schedule "
            f"remasking_strategy {' '.join(STRATEGY_OPTIONS)}",
        ),
        (
            rollouts and not itself,
            "teacher_response_fraction final_teacher_response_fraction "
            "teacher_response_fraction_schedule teacher_response_fraction_rollouts",
        ),
        (not rollouts, "train_iters"),
        (config.validation_path is not None, "eval_interval eval_iters keep_best_checkpoint"),
        (traits.weighs_tokens, "loss_weighting"),
        (masks_at_random, "empty_mask"),
        (traits.chooses_attention, "attention_pattern attention_annealing_iters"),
        (traits.diffusion_kind is not None, "mask_embedding_init"),
        (config.needs_teacher, "teacher_load"),
        (config.uses_teacher_responses, "teacher_responses"),
        (traits.uses_teacher, "offload_teacher offload_optimizer"),
        (traits.uses_teacher, f"cache_teacher_targets {DIVERGENCE}"),
    ):
        yield Use(condition, names, objective)
    remedy = f"use {flag_of('teacher_top_k')} or {flag_of('divergence_term_limit')}"
    yield Use(not itself, DIVERGENCE, objective, remedy)
    remedy = "choose --objective d_opsd"
    yield Use(itself, " ".join(SelfDistillationConfig.__dataclass_fields__), objective, remedy)
    yield Use(traits.verifies, "reward max_tries", objective, remedy)


def _uses_of_other_options(config: Config) -> Iterator[Use]:
    """What hangs on the value of another option."""

    def of(option: str, condition: bool, names: str, value: str = "", remedy: str = "") -> Use:
        """A use that another value of an option would make."""
        remedy = remedy or f"choose {flag_of(option)} {value}"
        return Use(condition, names, _as_given(config, option), remedy)

    def of_schedule(option: str, names: str) -> Use:
        return of(option, value_of(config, option) != "constant", names, "linear or cosine")

    strategy = config.rollout.remasking_strategy
    for name, option in STRATEGY_OPTIONS.items():
        having = [other.name for other in STRATEGIES.values() if other.option == option]
        condition = STRATEGIES[strategy].option == option
        yield of("remasking_strategy", condition, name, " or ".join(having))
    dynamic = "low_confidence_dynamic"
    yield of("remasking_strategy", strategy == dynamic, "dynamic_threshold_schedule", dynamic)
    yield of_schedule(
        "response_length_schedule", "min_response_length response_length_warmup_rollouts"
    )
    yield of_schedule(
        "dynamic_threshold_schedule",
        "final_dynamic_threshold dynamic_threshold_hold_rollouts dynamic_threshold_rollouts",
    )
    yield of_schedule(
        "teacher_response_fraction_schedule",
        "final_teacher_response_fraction teacher_response_fraction_rollouts",
    )
    yield of_schedule("lr_decay_style", "min_lr")
    yield of(
        "teacher_response_fraction",
        config.uses_teacher_responses,
        "teacher_response_fraction_schedule",
        remedy="choose a fraction above 0",
    )
    is_full = config.objective.attention_pattern != "causal"
    yield of("attention_pattern", is_full, "attention_annealing_iters", "full")
    samples = config.rollout.temperature > 0
    yield of("temperature", samples, "top_k top_p", remedy="choose a temperature above 0")
    yield of("divergence", "jsd" in config.distillation.divergence, "jsd_beta", "jsd")
    some = config.distillation.divergence_top_k > 0
    remedy = "choose e.g. --divergence-top-k 16"
    yield of("divergence_top_k", some, "divergence_tail", remedy=remedy)
    deletes = config.logging.keep_checkpoints > 0
    remedy = "choose e.g. --keep-checkpoints 3"
    yield of(
        "keep_checkpoints", deletes, "keep_checkpoint_every keep_best_checkpoint", remedy=remedy
    )
    saves = config.logging.save is not None
    yield Use(saves, "async_save", "a run without folder", "add --save")
    whole = config.model.recompute_granularity == "full"
    yield Use(config.parallel.watch_ranks, "stall_minutes", "--no-watch-ranks")
    yield of("recompute_granularity", whole, "recompute_method recompute_num_layers", "full")
    by_domain = (
        config.template.max_response_length_by_domain or config.template.prompt_suffix_by_domain
    )
    reason, remedy = "a run without options by domain", "add --max-response-length-by-domain"
    yield Use(bool(by_domain), "domain_field", reason, remedy)
    adapters, names = (
        config.lora.lora_rank is not None,
        "lora_alpha lora_dropout lora_target_modules",
    )
    yield Use(adapters, names, "training without adapters", "add --lora-rank")
    budget = "max_tokens_per_micro_batch"
    fixed = config.training.max_tokens_per_micro_batch is None
    yield Use(fixed, "micro_batch_size", _as_given(config, budget), f"drop {flag_of(budget)}")
    preset = config.optimizer.param_group_preset
    reason = "--param-groups" if preset is None else _as_given(config, "param_group_preset")
    for name in ("lr", "min_lr", "weight_decay"):
        remedy = f"choose --param-groups of which one names no {name}"
        yield Use(not _groups_cover(config, name), name, reason, remedy)


def _groups_cover(config: Config, name: str) -> bool:
    """Whether every parameter is in a group with its own value of an optimizer's setting."""
    groups = config.param_groups
    everything = any(group.pattern == "default" for group in groups)
    return everything and all(getattr(group, name) is not None for group in groups)


def _as_given(config: Config, name: str) -> str:
    """An option and its value as on the command line."""
    value = value_of(config, name)
    return f"{flag_of(name)} {value:g}" if isinstance(value, float) else f"{flag_of(name)} {value}"
