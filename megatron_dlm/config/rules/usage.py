"""Options that a run uses: an unused one must keep its default.

An option counts as set if it differs from its default, by a flag or a YAML file.
"""

from collections.abc import Iterator
from typing import NamedTuple

from megatron_dlm.config.fields import flag_of, option_fields, value_of
from megatron_dlm.config.groups import SelfDistillationConfig
from megatron_dlm.config.rules import Refusals, rule
from megatron_dlm.config.rules.model import CP, PP, VIRTUAL
from megatron_dlm.config.schema import HELD_OUT_OPTIONS, Config
from megatron_dlm.config.teacher_options import TEACHER_LAYOUT
from megatron_dlm.rollout.decoding_options import STRATEGY_OPTIONS
from megatron_dlm.rollout.decoding_settings import DecodingSetting
from megatron_dlm.rollout.strategies import STRATEGIES
from megatron_dlm.types.diffusion_kind import BLOCK_DIFFUSION

DIVERGENCE = "divergence jsd_beta divergence_top_k divergence_tail"
FRACTION = "final_teacher_response_fraction teacher_response_fraction_rollouts"
LENGTH = "min_response_length response_length_warmup_rollouts"
THRESHOLD = "final_dynamic_threshold dynamic_threshold_hold_rollouts dynamic_threshold_rollouts"
TEMPLATE = "max_response_length_by_domain prompt_suffix_by_domain chat_template_kwargs"
ROLLOUTS = "num_rollouts rollout_batch_size epochs_per_rollout response_length_schedule"
SERVERS = "rollout_engine_urls rollout_engine_weights rollout_engine_concurrency"
EVALUATION = "eval_prompts_interval eval_decodings eval_num_prompts eval_temperature"

OF_VALUES = (
    (f"{SERVERS} rollout_engine_timeout_s rollout_engine_retries", "rollout_engine", "sglang"),
    ("max_rollout_staleness", "rollout_engine", "sglang"),
    ("rollout_engine_weights_path", "rollout_engine_weights", "disk"),
    ("dynamic_threshold_schedule", "remasking_strategy", "low_confidence_dynamic"),
    (LENGTH, "response_length_schedule", "linear or cosine"),
    (THRESHOLD, "dynamic_threshold_schedule", "linear or cosine"),
    (FRACTION, "teacher_response_fraction_schedule", "linear or cosine"),
    ("min_lr", "lr_decay_style", "linear or cosine"),
    ("causal_loss_weight", "context_attention", "causal"),
    ("unsafe_code_execution", "reward", "code_tests"),
    ("recompute_method recompute_num_layers", "recompute_granularity", "full"),
    ("recompute_modules", "recompute_granularity", "selective"),
)
"""Options that only some values of another option use: names, that option, these values."""
OF_STRATEGIES = [
    (name, "remasking_strategy", " or ".join(s.name for s in STRATEGIES.values() if s.option == o))
    for name, o in STRATEGY_OPTIONS.items()
]
OF_GIVEN = (
    ("async_save save_interval save_interval_minutes keep_checkpoints wandb_project", "save"),
    ("fp8_recipe", "fp8_format"),
    ("lora_alpha lora_dropout lora_target_modules", "lora_rank"),
    (f"{EVALUATION} eval_max_response_length", "eval_prompts"),
)
"""Options that are used where another one is given: names, that option."""


class Use(NamedTuple):
    """A condition under which some options are used."""

    condition: bool
    names: str  # of the options, with spaces between them
    reason: str  # what has no use for them where the condition does not hold
    remedy: str = ""  # what would use them, as an imperative; empty: only another run


def is_used(config: Config, name: str) -> bool:
    """Whether the run reads an option."""
    return all(use.condition for use in uses(config) if name in use.names.split())


@rule("use")
def unused(config: Config) -> Refusals:
    """Unused options keep their defaults."""
    for use in uses(config):
        for name in use.names.split() if not use.condition else ():
            if value_of(config, name) != option_fields(Config)[name].default:
                remedy = f"drop {flag_of(name)}" + (f", or {use.remedy}" if use.remedy else "")
                yield f"{name}: {use.reason} has no use for it; {remedy}"


def uses(config: Config) -> tuple[Use, ...]:
    """The conditions of a configuration; an option in several of them is used if all hold.

    Raises:
        UserError: `--eval-decodings` names no setting.
    """
    evaluated = _read_by_evaluation(config)
    return (*_uses_of_objective(config, evaluated), *_uses_of_other_options(config, evaluated))


def _read_by_evaluation(config: Config) -> set[str]:
    """Strategy and options of strategies that evaluations on `--eval-prompts` take from a run."""
    texts = config.held_out.eval_decodings
    settings = [DecodingSetting.parse(text, "--eval-decodings") for text in texts]
    if settings or not config.evaluates or config.decodes_left_to_right:
        return {setting.option_left for setting in settings if setting.option_left is not None}
    option = STRATEGIES[config.rollout.remasking_strategy].option
    return {"remasking_strategy"} | (set() if option is None else {option.name})


def _uses_of_objective(config: Config, evaluated: set[str]) -> Iterator[Use]:
    """What hangs on the objective, on where its responses come from, and on held-out prompts."""
    traits, source, rollouts = config.traits, config.response_source, config.uses_rollouts
    corpus, itself, taught = source == "corpus", traits.self_distillation, traits.uses_teacher
    evaluates, validates = config.evaluates, config.validation_option is not None
    length, temperature = config.held_out.eval_max_response_length, config.held_out.eval_temperature
    generates = rollouts or config.uses_teacher_responses
    block_diffusion = traits.diffusion_kind == BLOCK_DIFFUSION
    # A given response has no visited states, and a corpus window no blocks.
    at_random = config.state_selection == "random" or config.uses_teacher_responses
    d_opsd, prompts = "choose --objective d_opsd", "add --eval-prompts"
    objective = f"{_as_given(config, 'objective')} on {flag_of(config.data_option)}"
    held_out = HELD_OUT_OPTIONS.get(source, "eval_prompts")
    for condition, names in (
        (source in ("rollout", "teacher"), "prompts"),
        (source == "data", "train_data train_on"),
        (corpus, "data_path seq_length"),
        (not corpus, "data_cache_path"),
        (not corpus or evaluates, f"max_prompt_length long_prompts {TEMPLATE}"),
        (not corpus or (evaluates and length is None), "max_response_length"),
        (not corpus and not itself, "supervise_eos"),
        (rollouts or block_diffusion, "block_size"),
        (generates or (evaluates and temperature is None), "temperature"),
        (generates or evaluates, "top_k top_p"),
        (rollouts, f"{ROLLOUTS} {LENGTH} dynamic_threshold_schedule"),
        *((rollouts or n in evaluated, n) for n in ("remasking_strategy", *STRATEGY_OPTIONS)),
        (rollouts and not traits.verifies, "partial_rollouts"),
        (rollouts, f"rollout_engine {SERVERS}"),
        (rollouts and not itself, f"teacher_response_fraction {FRACTION}"),
        (rollouts and not itself, "teacher_response_fraction_schedule"),
        (not rollouts, "train_iters"),
        (validates, "eval_interval eval_iters"),
        (traits.weighs_tokens, "loss_weighting"),
        (block_diffusion and at_random, "empty_mask"),
        (block_diffusion, "context_attention causal_loss_weight"),
        (traits.chooses_attention, "attention_pattern attention_annealing_iters"),
        (traits.diffusion_kind is not None, "mask_embedding_init"),
        (config.needs_teacher, "teacher_load"),
        (config.needs_teacher and not itself, "teacher_ranks teacher_url"),
        (config.needs_teacher, "teacher_precision"),
        (config.uses_teacher_responses, "teacher_responses"),
        (taught, f"offload_teacher offload_optimizer cache_teacher_targets {DIVERGENCE}"),
    ):
        yield Use(condition, names, objective)
    for condition, names, remedy in (
        (source == "data", "valid_data", f"add {flag_of(held_out)}"),
        (corpus, "valid_data_path", f"add {flag_of(held_out)}"),
        (not itself, DIVERGENCE, "use --teacher-top-k or --divergence-term-limit"),
        (itself, " ".join(option_fields(SelfDistillationConfig)), d_opsd),
        (traits.verifies, "max_tries", d_opsd),
        (traits.verifies or evaluates, "reward", f"{d_opsd}, or {prompts}"),
    ):
        yield Use(condition, names, objective, remedy)
    reason = "a run without held-out data"
    yield Use(evaluates or validates, "keep_best_checkpoint", reason, prompts)


def _uses_of_other_options(config: Config, evaluated: set[str]) -> Iterator[Use]:
    """What hangs on the value of another option."""
    rollout, distillation, template = config.rollout, config.distillation, config.template
    for names, option in OF_GIVEN:
        flag, is_given = flag_of(option), value_of(config, option) is not None
        yield Use(is_given, names, f"a run without {flag}", f"add {flag}")
    mixes, causal = config.uses_teacher_responses, config.objective.attention_pattern == "causal"
    evaluation_draws = config.evaluates and (config.held_out.eval_temperature or 0) > 0
    has_jsd, cuts = "jsd" in distillation.divergence, distillation.divergence_top_k > 0
    keeps, teacher = config.logging.keep_checkpoints > 0, config.teacher
    rows = [
        (rollout.partial_rollouts < 1, "max_response_rollouts", "partial_rollouts", "below 1"),
        (mixes, "teacher_response_fraction_schedule", "teacher_response_fraction", "above 0"),
        (not causal, "attention_annealing_iters", "attention_pattern", "full"),
        (rollout.temperature > 0 or evaluation_draws, "top_k top_p", "temperature", "above 0"),
        (has_jsd, "jsd_beta", "divergence", "jsd"),
        (cuts, "divergence_tail", "divergence_top_k", "16"),
        (keeps, "keep_checkpoint_every keep_best_checkpoint", "keep_checkpoints", "3"),
        (teacher.teacher_ranks > 0, " ".join(TEACHER_LAYOUT), "teacher_ranks", "above 0"),
        (value_of(config, PP) > 1, f"decoding_groups {VIRTUAL}", PP, "2 or more"),
        (value_of(config, CP) > 1, "rollout_context_parallel", CP, "2 or more"),
    ]
    for names, option, values in (*OF_VALUES, *OF_STRATEGIES):
        is_chosen = value_of(config, option) in values.split(" or ") or names in evaluated
        rows.append((is_chosen, names, option, values))
    for condition, names, option, values in rows:
        yield Use(condition, names, _as_given(config, option), f"choose {flag_of(option)} {values}")
    by_domain = template.max_response_length_by_domain or template.prompt_suffix_by_domain
    reason, remedy = "a run without options by domain", "add --max-response-length-by-domain"
    yield Use(bool(by_domain), "domain_field", reason, remedy)
    itself = config.decodes_itself or config.evaluates
    answers = config.uses_teacher_responses
    decodes = itself or (answers and not teacher.teacher_url)
    reason = _as_given(config, "rollout_engine")
    if not config.uses_rollouts:
        reason = f"{_as_given(config, 'objective')} on {flag_of(config.data_option)}"
    yield Use(itself or answers, "max_running_requests", reason)
    yield Use(itself, "shared_rollout_queue", reason)
    if answers and config.has_remote_teacher:
        reason += f" with --teacher-{'url' if teacher.teacher_url else 'ranks'}"
    yield Use(
        decodes, "max_total_tokens chunked_prefill_size decoding_groups rollout_graphs", reason
    )
    shares = itself or (answers and not config.has_remote_teacher)
    yield Use(shares, "rollout_context_parallel", reason)
    yield Use(config.parallel.watch_ranks, "stall_minutes", "--no-watch-ranks")
    reason, remedy = "a teacher in memory", "add --teacher-ranks or --teacher-url"
    remote, of_remote = config.has_remote_teacher, "teacher_max_requests teacher_timeout_s"
    yield Use(remote, of_remote, reason, remedy)
    yield Use(not teacher.teacher_url, "teacher_load teacher_precision", "a run with --teacher-url")
    fixed, name = config.training.max_tokens_per_micro_batch is None, "max_tokens_per_micro_batch"
    yield Use(fixed, "micro_batch_size", _as_given(config, name), f"drop {flag_of(name)}")
    preset, param_groups = config.optimizer.param_group_preset, config.param_groups
    reason = "--param-groups" if preset is None else _as_given(config, "param_group_preset")
    covers = any(group.pattern == "default" for group in param_groups)
    for name in ("lr", "min_lr", "weight_decay"):
        # Whether every parameter is in a group with its own value.
        own = covers and all(getattr(group, name) is not None for group in param_groups)
        yield Use(not own, name, reason, f"choose --param-groups of which one names no {name}")


def _as_given(config: Config, name: str) -> str:
    """An option and its value as on the command line."""
    value = value_of(config, name)
    return f"{flag_of(name)} {value:g}" if isinstance(value, float) else f"{flag_of(name)} {value}"
