"""Rules between an objective and its data, weights, adapters, teacher and states."""

from __future__ import annotations

from megatron_dlm.config.fields import flag_of
from megatron_dlm.config.objective_traits import OBJECTIVE_TRAITS
from megatron_dlm.config.rules.registry import Stage, rule
from megatron_dlm.config.rules.support import refuse, value_of
from megatron_dlm.config.schema import Config


def _objective(config: Config) -> str:
    return f"--objective {config.objective.objective}"


@rule(Stage.NEEDS)
def check_objective_inputs(config: Config) -> None:
    """The objective has the data, the weights and the duration that it needs."""
    data = config.data_option
    duration = "num_rollouts" if config.uses_rollouts else "train_iters"
    if value_of(config, data) is None:
        remedy = f"add {flag_of(data)}"
        others = {"data": "--train-data", "corpus": "--data-path"}
        for source in config.traits.response_sources:
            if source in others and source != config.response_source:
                remedy += f", or {others[source]}"
        raise refuse(config, data, f"{_objective(config)} needs it", remedy)
    given, epochs = value_of(config, duration), config.training.num_epochs
    if given is None and epochs is None:
        remedy = f"add {flag_of(duration)}, or --num-epochs"
        raise refuse(config, duration, f"{_objective(config)} needs it", remedy)
    if given is not None and epochs is not None:
        raise refuse(
            config,
            "num_epochs",
            f"{flag_of(duration)} {given} is given too",
            "leave one of the two out",
        )
    model = config.model
    if config.needs_teacher and model.load is None:
        raise refuse(
            config,
            "load",
            f"{_objective(config)} needs weights to convert",
            "name a checkpoint folder",
        )
    if model.load is None and model.model_config is None:
        raise refuse(
            config, "load", "there is no model", "add --load, or --model-config for random weights"
        )


@rule(Stage.NEEDS)
def check_response_source(config: Config) -> None:
    """Where an objective could take responses from two places, one is named."""
    sources = config.traits.response_sources
    either = "data" in sources and "teacher" in sources
    if either and config.data.train_data is not None and config.data.prompts is not None:
        raise refuse(
            config,
            "prompts",
            f"{_objective(config)} takes responses from --train-data, or the teacher's to "
            "--prompts, not both",
            "leave one of the two out",
        )
    both = config.data.train_data is not None and config.data.data_path is not None
    if "corpus" in sources and "data" in sources and both:
        raise refuse(
            config,
            "data_path",
            f"{_objective(config)} trains on it or on --train-data, not on both",
            "leave one of the two out",
        )


@rule(Stage.NEEDS)
def check_validation(config: Config) -> None:
    """Held-out data are of the kind that the run trains on, and its loss needs no rollout."""
    for name in ("valid_data", "valid_data_path"):
        if value_of(config, name) is None or name == config.validation_option:
            continue
        remedy = (
            "leave it out; megatron-dlm evaluate measures held-out prompts"
            if config.validation_option is None
            else f"give {flag_of(config.validation_option)}"
        )
        raise refuse(
            config,
            name,
            f"{_objective(config)} on {flag_of(config.data_option)} has no validation loss over it",
            remedy,
        )


@rule(Stage.NEEDS)
def check_state_selection(config: Config) -> None:
    """The objective can be trained on the states that were chosen."""
    chosen, possible = config.objective.state_selection, config.traits.state_selections
    if chosen is None or chosen in possible:
        return
    remedy = f"choose {' or '.join(possible)}" if possible else "leave it out"
    others = [
        name for name, traits in OBJECTIVE_TRAITS.items() if chosen in traits.state_selections
    ]
    raise refuse(
        config,
        "state_selection",
        f"{_objective(config)} has no such states",
        f"{remedy}, or --objective {' or '.join(others)}",
    )


@rule(Stage.COMBINATIONS)
def check_lora(config: Config) -> None:
    """Adapters are described by layers that can have them."""
    lora = config.lora
    if lora.lora_rank is None:
        return
    if not lora.lora_target_modules:
        raise refuse(config, "lora_target_modules", "names no layer", "name e.g. linear_qkv")
    if config.model.transformer_impl != "local":
        raise refuse(
            config,
            "lora_rank",
            "adapters need Megatron's local layers",
            "choose --transformer-impl local",
        )


@rule(Stage.COMBINATIONS)
def check_self_distillation(config: Config) -> None:
    """A frozen teacher exists."""
    if config.teaches_itself and config.lora.lora_rank is None:
        raise refuse(
            config,
            "teacher_load",
            "without adapters nothing keeps the weights that the student started from",
            "add --lora-rank, or name those weights for a frozen copy",
        )


@rule(Stage.COMBINATIONS)
def check_something_to_learn(config: Config) -> None:
    """A further try differs from the first, and some state has a later block."""
    rollout = config.rollout
    if config.traits.verifies and rollout.max_tries > 1:
        for name, value in (("temperature", 0), ("top_k", 1)):
            if value_of(config, name) == value:
                raise refuse(
                    config,
                    name,
                    f"all {rollout.max_tries} tries would be the same response",
                    "sample it, or choose --max-tries 1",
                )
    longest = config.data.max_prompt_length + rollout.max_response_length
    if config.traits.self_distillation and longest <= config.model.block_size:
        raise refuse(
            config,
            "block_size",
            f"holds the longest prompt and response ({longest} tokens), so that no state has a "
            "later block to learn from",
            f"choose less than {longest}, or a larger --max-response-length",
        )


@rule(Stage.COMBINATIONS)
def check_empty_mask(config: Config) -> None:
    """A token masked by force is not weighted by the 1/t under which none was."""
    weighted = config.traits.weighs_tokens and config.objective.loss_weighting == "inverse_t"
    if config.objective.empty_mask == "mask_one" and weighted:
        raise refuse(
            config,
            "empty_mask",
            "with --loss-weighting inverse_t the loss has no mean: t can be near 0",
            "choose redraw, or --loss-weighting none",
        )


@rule(Stage.COMBINATIONS)
def check_teacher_responses(config: Config) -> None:
    """The teacher's responses have a folder."""
    if config.uses_teacher_responses and config.teacher_responses is None:
        raise refuse(
            config,
            "teacher_responses",
            "the teacher's responses have no folder",
            "name one, or add --save",
        )


@rule(Stage.COMBINATIONS)
def check_cache_teacher_targets(config: Config) -> None:
    """Distributions are stored only for responses that do not change, and only k tokens of each."""
    if not config.distillation.cache_teacher_targets or not config.traits.uses_teacher:
        return
    if config.uses_rollouts:
        raise refuse(
            config,
            "cache_teacher_targets",
            f"{_objective(config)} trains on new rollouts, which the teacher has to see",
            "drop --cache-teacher-targets, or choose --objective off_policy",
        )
    if config.distillation.divergence_top_k == 0:
        raise refuse(
            config,
            "divergence_top_k",
            "--cache-teacher-targets cannot store the full vocabulary",
            "choose e.g. 16, or drop --cache-teacher-targets",
        )


@rule(Stage.COMBINATIONS)
def check_offloading(config: Config) -> None:
    """What is offloaded exists, and offloading it frees memory."""
    for name in ("offload_teacher", "offload_optimizer"):
        if value_of(config, name) and config.distillation.cache_teacher_targets:
            raise refuse(
                config,
                name,
                "with --cache-teacher-targets there is no teacher in memory",
                f"drop {flag_of(name)}",
            )
    if config.distillation.offload_teacher and config.teaches_itself:
        raise refuse(
            config,
            "offload_teacher",
            "the teacher is the student without its adapters",
            "drop --offload-teacher, or name a frozen copy with --teacher-load",
        )


@rule(Stage.LENGTH)
def check_attention_annealing(config: Config) -> None:
    """Attention annealing ends before the run does."""
    iters = config.objective.attention_annealing_iters
    if 0 < config.train_iters < iters:  # 0: epochs of data that have not been read
        raise refuse(
            config,
            "attention_annealing_iters",
            f"the run ends after {config.train_iters} updates, before attention is full",
            f"choose {config.train_iters} or fewer",
        )
