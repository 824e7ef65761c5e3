"""Rules between an objective and its data, weights, adapters, teacher and states."""

from megatron_dlm.config.divergence_spec import DivergenceSpec
from megatron_dlm.config.fields import flag_of, value_of
from megatron_dlm.config.objective_traits import OBJECTIVE_TRAITS
from megatron_dlm.config.rules import Refusals
from megatron_dlm.config.schema import DATA_OPTIONS, Config


def needs(config: Config) -> Refusals:
    """The objective has the data, weights, duration, states and divergence that it needs."""
    DivergenceSpec.parse(config.distillation.divergence)
    objective = f"--objective {config.objective.objective}"
    data, sources, needed = config.data, config.traits.response_sources, config.data_option
    if value_of(config, needed) is None:
        others = [DATA_OPTIONS[source] for source in sources if source in DATA_OPTIONS]
        flags = dict.fromkeys(flag_of(name) for name in (needed, *others))
        yield f"{needed}: {objective} needs it; add {', or '.join(flags)}"
    duration = "num_rollouts" if config.uses_rollouts else "train_iters"
    given, epochs = value_of(config, duration), config.training.num_epochs
    if given is None and epochs is None:
        yield f"{duration}: {objective} needs it; add {flag_of(duration)}, or --num-epochs"
    if given is not None and epochs is not None:
        yield f"num_epochs: {flag_of(duration)} {given} is given too; leave one of the two out"
    if config.needs_teacher and config.model.load is None:
        yield f"load: {objective} needs weights to convert; name a checkpoint folder"
    if config.model.load is None and config.model.model_config is None:
        yield "load: there is no model; add --load, or --model-config for random weights"
    for name, source in (("prompts", "teacher"), ("data_path", "corpus")):
        has_both = None not in (data.train_data, value_of(config, name))
        if has_both and {"data", source} <= set(sources):
            problem = f"{objective} trains on it or on --train-data, not on both"
            yield f"{name}: {problem}; leave one of the two out"
    measured = config.validation_option
    remedy = "leave it out; --eval-prompts measures accuracy on held-out prompts"
    for name in ("valid_data", "valid_data_path"):
        if value_of(config, name) is not None and name != measured:
            run = f"{objective} on {flag_of(config.data_option)}"
            remedy = f"give {flag_of(measured)}" if measured else remedy
            yield f"{name}: {run} has no validation loss over it; {remedy}"
    chosen, possible = config.objective.state_selection, config.traits.state_selections
    if chosen is not None and chosen not in possible:
        remedy = f"choose {' or '.join(possible)}" if possible else "leave it out"
        having = [n for n, traits in OBJECTIVE_TRAITS.items() if chosen in traits.state_selections]
        remedy += f", or --objective {' or '.join(having)}"
        yield f"state_selection: {objective} has no such states; {remedy}"


def combinations(config: Config) -> Refusals:
    """Adapters, teacher and states go together, and there is something to learn."""
    lora, distillation, rollout = config.lora, config.distillation, config.rollout
    if lora.lora_rank is not None and not lora.lora_target_modules:
        yield "lora_target_modules: names no layer; name e.g. linear_qkv"
    if lora.lora_rank is not None and config.model.transformer_impl != "local":
        yield "lora_rank: adapters need Megatron's local layers; choose --transformer-impl local"
    if config.teaches_itself and lora.lora_rank is None:
        yield (
            "teacher_load: without adapters nothing keeps the weights that the student started "
            "from; add --lora-rank, or name those weights for a frozen copy"
        )
    for name, value in (("temperature", 0), ("top_k", 1)) if config.traits.verifies else ():
        if rollout.max_tries > 1 and value_of(config, name) == value:
            problem = f"all {rollout.max_tries} tries would be the same response"
            yield f"{name}: {problem}; sample it, or choose --max-tries 1"
    longest = config.data.max_prompt_length + rollout.max_response_length
    if config.traits.self_distillation and longest <= config.model.block_size:
        yield (
            f"block_size: holds the longest prompt and response ({longest} tokens), so that no "
            f"state has a later block to learn from; choose less than {longest}, or a larger "
            "--max-response-length"
        )
    is_weighted = config.traits.weighs_tokens and config.objective.loss_weighting == "inverse_t"
    if config.objective.empty_mask == "mask_one" and is_weighted:
        yield (
            "empty_mask: with --loss-weighting inverse_t the loss has no mean: t can be near 0; "
            "choose redraw, or --loss-weighting none"
        )
    if config.rollout.partial_rollouts < 1 and config.uses_teacher_responses:
        yield (
            "partial_rollouts: which rollout a response of the teacher belongs to would depend on "
            "what others leave; choose 1, or --teacher-response-fraction 0"
        )
    if config.uses_teacher_responses and config.teacher_responses is None:
        yield "teacher_responses: the teacher's responses have no folder; name one, or add --save"
    stores = distillation.cache_teacher_targets
    if stores and config.traits.uses_teacher and config.uses_rollouts:
        yield (
            f"cache_teacher_targets: --objective {config.objective.objective} trains on new "
            "rollouts, which the teacher has to see; drop --cache-teacher-targets, or choose "
            "--objective off_policy"
        )
    if stores and config.traits.uses_teacher and distillation.divergence_top_k == 0:
        yield (
            "divergence_top_k: --cache-teacher-targets cannot store the full vocabulary; "
            "choose e.g. 16, or drop --cache-teacher-targets"
        )
    for name in ("offload_teacher", "offload_optimizer"):
        if stores and value_of(config, name):
            problem = "with --cache-teacher-targets there is no teacher in memory"
            yield f"{name}: {problem}; drop {flag_of(name)}"
    if distillation.offload_teacher and config.teaches_itself:
        yield (
            "offload_teacher: the teacher is the student without its adapters; drop "
            "--offload-teacher, or name a frozen copy with --teacher-load"
        )


def length(config: Config) -> Refusals:
    """Attention annealing ends before the run does (0: epochs of data that are not read yet)."""
    if 0 < config.train_iters < config.objective.attention_annealing_iters:
        yield (
            f"attention_annealing_iters: the run ends after {config.train_iters} updates, before "
            f"attention is full; choose {config.train_iters} or fewer"
        )
