"""Rules between an objective and its data, weights, adapters, teacher and states."""

import re

from megatron_dlm.config.fields import flag_of, value_of
from megatron_dlm.config.objective_traits import OBJECTIVE_TRAITS
from megatron_dlm.config.rules import Refusals, rule
from megatron_dlm.config.schema import DATA_OPTIONS, Config
from megatron_dlm.rollout.strategies import STRATEGIES
from megatron_dlm.types.divergence_spec import DivergenceSpec

_SERVER_URL = re.compile(r"https?://[^\s/?#]+")


@rule("use")
def needs(config: Config) -> Refusals:
    """The objective has the data, weights, duration, states and divergence that it needs."""
    DivergenceSpec.parse(config.distillation.divergence)
    objective = f"--objective {config.objective.objective}"
    sources, needed, load = config.traits.response_sources, config.data_option, config.model.load
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
    if config.needs_teacher and load is None:
        yield f"load: {objective} needs weights to convert; name a checkpoint folder"
    if load is None and config.model.model_config is None:
        yield "load: there is no model; add --load, or --model-config for random weights"
    chosen, possible = config.objective.state_selection, config.traits.state_selections
    if chosen is not None and chosen not in possible:
        having = [n for n, traits in OBJECTIVE_TRAITS.items() if chosen in traits.state_selections]
        remedy = f"choose {' or '.join(possible)}" if possible else "leave it out"
        remedy += f", or --objective {' or '.join(having)}"
        yield f"state_selection: {objective} has no such states; {remedy}"


@rule("options")
def combinations(config: Config) -> Refusals:
    """Adapters, teacher and states go together, and there is something to learn."""
    lora, distillation, rollout = config.lora, config.distillation, config.rollout
    if lora.lora_rank is not None and not lora.lora_target_modules:
        yield "lora_target_modules: names no layer; name e.g. linear_qkv"
    if lora.lora_rank is not None and config.model.transformer_impl != "local":
        yield "lora_rank: adapters need Megatron's local layers; choose --transformer-impl local"
    if config.teaches_itself and lora.lora_rank is None:
        problem = "without adapters nothing keeps the weights that the student started from"
        yield f"teacher_load: {problem}; add --lora-rank, or name those weights for a frozen copy"
    for name, value in (("temperature", 0), ("top_k", 1)) if config.traits.verifies else ():
        if rollout.max_tries > 1 and value_of(config, name) == value:
            tries = f"all {rollout.max_tries} tries would be the same"
            yield f"{name}: {tries}; sample, or choose --max-tries 1"
    if config.uses_rollouts and STRATEGIES[rollout.remasking_strategy].verifies:
        problem = "writes the autoregressive mode's responses, without states to train on"
        yield f"remasking_strategy: {problem}; choose another one, or name it in --eval-decodings"
    kind, decodes = config.diffusion_kind, config.decodes_itself or config.evaluates
    if rollout.rollout_graphs == "on" and decodes and kind and kind.attention_pattern == "full":
        problem = "under full attention a forward holds whole sequences, without a cache"
        yield f"rollout_graphs: {problem}; choose auto or off"
    longest = config.data.max_prompt_length + rollout.max_response_length
    if config.traits.self_distillation and longest <= config.model.block_size:
        problem = f"holds all of prompt and response ({longest} tokens): no state has a later block"
        remedy = f"choose less than {longest}, or a larger --max-response-length"
        yield f"block_size: {problem}; {remedy}"
    is_weighted = config.traits.weighs_tokens and config.objective.loss_weighting == "inverse_t"
    if config.objective.empty_mask == "mask_one" and is_weighted:
        problem = "with --loss-weighting inverse_t the loss has no mean: t can be near 0"
        yield f"empty_mask: {problem}; choose redraw, or --loss-weighting none"
    if config.rollout.partial_rollouts < 1 and config.uses_teacher_responses:
        problem = (
            "what others leave would decide which rollout a response of the teacher belongs to"
        )
        yield f"partial_rollouts: {problem}; choose 1, or --teacher-response-fraction 0"
    if config.uses_teacher_responses and config.teacher_responses is None:
        yield "teacher_responses: the teacher's responses have no folder; name one, or add --save"
    stores = distillation.cache_teacher_targets and config.traits.uses_teacher
    if stores and config.uses_rollouts:
        problem = f"the teacher of {config.objective.objective} has to see every new rollout"
        yield f"cache_teacher_targets: {problem}; drop it, or choose --objective off_policy"
    if stores and distillation.divergence_top_k == 0:
        problem = "--cache-teacher-targets cannot store the full vocabulary"
        yield f"divergence_top_k: {problem}; choose e.g. 16, or drop --cache-teacher-targets"
    for name in ("offload_teacher", "offload_optimizer"):
        if stores and value_of(config, name):
            yield f"{name}: --cache-teacher-targets leaves no teacher in memory; drop either"
    if distillation.offload_teacher and config.teaches_itself:
        problem = "the teacher is the student without its adapters"
        yield f"offload_teacher: {problem}; drop it, or name a frozen copy with --teacher-load"


@rule("options")
def rollout_engine(config: Config) -> Refusals:
    """Servers that decode rollouts can do what the run asks for."""
    rollout, servers = config.rollout, config.engine
    if servers.rollout_engine == "internal":
        return
    engine = f"--rollout-engine {servers.rollout_engine}"
    if not servers.rollout_engine_urls:
        yield f"rollout_engine_urls: {engine} has no server; name one as http://HOST:PORT"
    for url in servers.rollout_engine_urls:
        if not _SERVER_URL.fullmatch(url):
            yield f"rollout_engine_urls: {url!r} is no address; write http://HOST:PORT"
    if len(set(servers.rollout_engine_urls)) < len(servers.rollout_engine_urls):
        yield "rollout_engine_urls: names a server twice; name it once"
    if rollout.partial_rollouts < 1:
        problem = f"{engine} finishes every response"
        yield f"partial_rollouts: {problem}; choose 1, or --rollout-engine internal"
    if rollout.dynamic_threshold_schedule != "constant":
        problem = f"{engine} decodes with the threshold that its servers were started with"
        yield f"dynamic_threshold_schedule: {problem}; choose constant"
    if servers.max_rollout_staleness and config.traits.verifies:
        problem = f"{config.objective.objective} asks again, of weights that have changed meanwhile"
        yield f"max_rollout_staleness: {problem}; choose 0"
    if config.lora.lora_rank is not None:
        problem = f"{engine} is sent the weights of whole layers"
        yield f"lora_rank: {problem}; drop it, or choose --rollout-engine internal"
    if rollout.rollout_context_parallel == "tokens":
        problem = f"{engine} decodes on servers, which share nothing with these processes"
        yield f"rollout_context_parallel: {problem}; choose sequences"
    by_disk = servers.rollout_engine_weights == "disk"
    if by_disk and servers.rollout_engine_weights_path is None and config.logging.save is None:
        problem = "the servers read weights from a folder, and there is no run folder"
        yield f"rollout_engine_weights_path: {problem}; name one, or add --save"
