"""Options that a run uses: an unused one must keep its default.

An option counts as set if it differs from its default, by a flag or a YAML file.
"""

from collections.abc import Iterator
from typing import NamedTuple

from megatron_dlm.config.fields import flag_of, option_fields, value_of
from megatron_dlm.config.groups import SelfDistillationConfig
from megatron_dlm.config.rules import Refusals
from megatron_dlm.config.schema import Config
from megatron_dlm.rollout.decoding_options import STRATEGY_OPTIONS
from megatron_dlm.rollout.decoding_settings import DecodingSetting
from megatron_dlm.rollout.strategies import STRATEGIES
from megatron_dlm.types.diffusion_kind import BLOCK_DIFFUSION

DIVERGENCE = "divergence jsd_beta divergence_top_k divergence_tail"
FRACTION = "final_teacher_response_fraction teacher_response_fraction_rollouts"
RESPONSE_LENGTH = "min_response_length response_length_warmup_rollouts"
OF_EXAMPLES = (
    "max_prompt_length long_prompts max_response_length_by_domain prompt_suffix_by_domain "
    "chat_template_kwargs"
)
OF_ROLLOUTS = (
    "num_rollouts rollout_batch_size epochs_per_rollout response_length_schedule "
    f"{RESPONSE_LENGTH} dynamic_threshold_schedule"
)
OF_EVALUATION = (
    "eval_prompts_interval eval_decodings eval_num_prompts eval_temperature "
    "eval_max_response_length"
)


class Use(NamedTuple):
    """A condition under which some options are used."""

    condition: bool
    names: str  # of the options, with spaces between them
    reason: str  # what has no use for them where the condition does not hold
    remedy: str = ""  # what would use them, as an imperative; empty: only another run


def uses(config: Config) -> tuple[Use, ...]:
    """The conditions of a configuration; an option in several of them is used if all hold."""
    return (*_uses_of_objective(config), *_uses_of_other_options(config))


def is_used(config: Config, name: str) -> bool:
    """Whether the run reads an option."""
    return all(use.condition for use in uses(config) if name in use.names.split())


def unused(config: Config) -> Refusals:
    """Unused options keep their defaults."""
    for use in uses(config):
        for name in use.names.split() if not use.condition else ():
            if value_of(config, name) != option_fields(Config)[name].default:
                remedy = f"drop {flag_of(name)}" + (f", or {use.remedy}" if use.remedy else "")
                yield f"{name}: {use.reason} has no use for it; {remedy}"


def _strategy_read_by_evaluation(config: Config) -> set[str]:
    """Strategy and options of strategies that evaluations on `--eval-prompts` take from a run.

    Raises:
        UserError: `--eval-decodings` names no setting.
    """
    texts = config.held_out.eval_decodings
    settings = [DecodingSetting.parse(text, "--eval-decodings") for text in texts]
    if settings or not config.evaluates or config.decodes_left_to_right:
        return {setting.option_left for setting in settings if setting.option_left is not None}
    option = STRATEGIES[config.rollout.remasking_strategy].option
    return {"remasking_strategy"} | (set() if option is None else {option.name})


def _uses_of_objective(config: Config) -> Iterator[Use]:
    """What hangs on the objective, on where its responses come from, and on held-out prompts."""
    traits, source, rollouts = config.traits, config.response_source, config.uses_rollouts
    evaluates, held_out = config.evaluates, config.held_out
    read = _strategy_read_by_evaluation(config)
    corpus, itself, taught = source == "corpus", traits.self_distillation, traits.uses_teacher
    generates = rollouts or config.uses_teacher_responses
    block_diffusion = traits.diffusion_kind == BLOCK_DIFFUSION
    # A given response has no visited states, and a corpus window no blocks.
    at_random = config.state_selection == "random" or config.uses_teacher_responses
    objective = _as_given(config, "objective")
    for condition, names in (
        (source in ("rollout", "teacher"), "prompts"),
        (source == "data", "train_data train_on"),
        (corpus, "data_path seq_length"),
        (not corpus or evaluates, OF_EXAMPLES),
        (
            not corpus or (evaluates and held_out.eval_max_response_length is None),
            "max_response_length",
        ),
        (not corpus and not itself, "supervise_eos"),
        (rollouts or block_diffusion, "block_size"),
        (generates or (evaluates and held_out.eval_temperature is None), "temperature"),
        (
            generates or evaluates,
            "top_k top_p max_running_requests max_total_tokens chunked_prefill_size",
        ),
        (rollouts, OF_ROLLOUTS),
        *((rollouts or n in read, n) for n in ("remasking_strategy", *STRATEGY_OPTIONS)),
        (rollouts or evaluates, "shared_rollout_queue"),
        (rollouts and not traits.verifies, "partial_rollouts"),
        (
            rollouts and not itself,
            f"teacher_response_fraction {FRACTION} teacher_response_fraction_schedule",
        ),
        (not rollouts, "train_iters"),
        (config.validation_path is not None, "eval_interval eval_iters"),
        (traits.weighs_tokens, "loss_weighting"),
        (block_diffusion and at_random, "empty_mask"),
        (traits.chooses_attention, "attention_pattern attention_annealing_iters"),
        (traits.diffusion_kind is not None, "mask_embedding_init"),
        (config.needs_teacher, "teacher_load"),
        (config.uses_teacher_responses, "teacher_responses"),
        (taught, f"offload_teacher offload_optimizer cache_teacher_targets {DIVERGENCE}"),
    ):
        yield Use(condition, names, objective)
    remedy = "use --teacher-top-k or --divergence-term-limit"
    yield Use(not itself, DIVERGENCE, objective, remedy)
    remedy = "choose --objective d_opsd"
    yield Use(itself, " ".join(SelfDistillationConfig.__dataclass_fields__), objective, remedy)
    yield Use(traits.verifies, "max_tries", objective, remedy)
    yield Use(traits.verifies or evaluates, "reward", objective, f"{remedy}, or add --eval-prompts")
    reason, remedy = "a run without --eval-prompts", "add --eval-prompts"
    yield Use(evaluates, OF_EVALUATION, reason, remedy)
    measures = evaluates or config.validation_path is not None
    yield Use(measures, "keep_best_checkpoint", "a run without held-out data", remedy)


def _uses_of_other_options(config: Config) -> Iterator[Use]:
    """What hangs on the value of another option."""

    def of(option: str, condition: bool, names: str, remedy: str) -> Use:
        """A use that another value of an option would make."""
        return Use(condition, names, _as_given(config, option), f"choose {remedy}")

    def of_schedule(option: str, names: str) -> Use:
        changes = value_of(config, option) != "constant"
        return of(option, changes, names, f"{flag_of(option)} linear or cosine")

    rollout, logging, template = config.rollout, config.logging, config.template
    strategy, read = rollout.remasking_strategy, _strategy_read_by_evaluation(config)
    for name, option in STRATEGY_OPTIONS.items():
        having = [other.name for other in STRATEGIES.values() if other.option == option]
        remedy = f"--remasking-strategy {' or '.join(having)}"
        is_used = STRATEGIES[strategy].option == option or name in read
        yield of("remasking_strategy", is_used, name, remedy)
    remedy = "--remasking-strategy low_confidence_dynamic"
    dynamic = strategy == "low_confidence_dynamic"
    yield of("remasking_strategy", dynamic, "dynamic_threshold_schedule", remedy)
    names = "final_dynamic_threshold dynamic_threshold_hold_rollouts dynamic_threshold_rollouts"
    yield of_schedule("response_length_schedule", RESPONSE_LENGTH)
    yield of_schedule("dynamic_threshold_schedule", names)
    yield of_schedule("teacher_response_fraction_schedule", FRACTION)
    yield of_schedule("lr_decay_style", "min_lr")
    waits = rollout.partial_rollouts == 1
    remedy = "a share below 1"
    yield of("partial_rollouts", not waits, "max_response_rollouts", remedy)
    mixes, name = config.uses_teacher_responses, "teacher_response_fraction"
    yield of(name, mixes, f"{name}_schedule", "a fraction above 0")
    is_full, name = config.objective.attention_pattern != "causal", "attention_pattern"
    yield of(name, is_full, "attention_annealing_iters", "--attention-pattern full")
    draws = rollout.temperature > 0 or (config.evaluates and config.eval_temperature > 0)
    yield of("temperature", draws, "top_k top_p", "a temperature above 0")
    has_jsd = "jsd" in config.distillation.divergence
    yield of("divergence", has_jsd, "jsd_beta", "--divergence jsd")
    runs_code = config.objective.reward == "code_tests"
    yield of("reward", runs_code, "unsafe_code_execution", "--reward code_tests")
    cuts, remedy = config.distillation.divergence_top_k > 0, "e.g. --divergence-top-k 16"
    yield of("divergence_top_k", cuts, "divergence_tail", remedy)
    names, remedy = "keep_checkpoint_every keep_best_checkpoint", "e.g. --keep-checkpoints 3"
    yield of("keep_checkpoints", logging.keep_checkpoints > 0, names, remedy)
    names = "async_save save_interval save_interval_minutes keep_checkpoints wandb_project"
    yield Use(logging.save is not None, names, "a run without folder", "add --save")
    yield Use(config.parallel.watch_ranks, "stall_minutes", "--no-watch-ranks")
    whole, name = config.model.recompute_granularity == "full", "recompute_granularity"
    names = "recompute_method recompute_num_layers"
    yield of(name, whole, names, "--recompute-granularity full")
    parts = config.model.recompute_granularity == "selective"
    yield of(name, parts, "recompute_modules", "--recompute-granularity selective")
    quantized, remedy = config.model.fp8_format is not None, "add --fp8-format"
    yield Use(quantized, "fp8_recipe", "a run without --fp8-format", remedy)
    by_domain = template.max_response_length_by_domain or template.prompt_suffix_by_domain
    reason, remedy = "a run without options by domain", "add --max-response-length-by-domain"
    yield Use(bool(by_domain), "domain_field", reason, remedy)
    names = "lora_alpha lora_dropout lora_target_modules"
    adapters, reason = config.lora.lora_rank is not None, "training without adapters"
    yield Use(adapters, names, reason, "add --lora-rank")
    fixed, name = config.training.max_tokens_per_micro_batch is None, "max_tokens_per_micro_batch"
    yield Use(fixed, "micro_batch_size", _as_given(config, name), f"drop {flag_of(name)}")
    preset = config.optimizer.param_group_preset
    reason = "--param-groups" if preset is None else _as_given(config, "param_group_preset")
    covers = any(group.pattern == "default" for group in config.param_groups)
    for name in ("lr", "min_lr", "weight_decay"):
        # Whether every parameter is in a group with its own value.
        own = covers and all(getattr(group, name) is not None for group in config.param_groups)
        yield Use(not own, name, reason, f"choose --param-groups of which one names no {name}")


def _as_given(config: Config, name: str) -> str:
    """An option and its value as on the command line."""
    value = value_of(config, name)
    return f"{flag_of(name)} {value:g}" if isinstance(value, float) else f"{flag_of(name)} {value}"
