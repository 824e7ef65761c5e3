"""Rules between a configuration, its processes and the sizes of the model it is for."""

import math

from megatron_dlm.config.fields import flag_of, value_of
from megatron_dlm.config.rules import Refusals, divisors, rule
from megatron_dlm.config.schema import Config
from megatron_dlm.errors import bad_value
from megatron_dlm.types.model_sizes import ModelSizes

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
VIRTUAL = "num_virtual_stages_per_pipeline_rank"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
CP = "context_parallel_size"


def _product(config: Config, *names: str) -> int:
    """The product of some sizes of the layout, defaults resolved."""
    resolved = {ETP: config.expert_tensor_parallel_size}
    return math.prod(resolved.get(name) or value_of(config, name) for name in names)


def _divide(
    config: Config, whole: int | None, items: str, *names: str, remedy: str = ""
) -> Refusals:
    """Some items, of which there may be none, are shared evenly by the product of some sizes."""
    parts = _product(config, *names)
    if whole is not None and whole % parts:
        problem = f"does not divide {items.format(whole)}"
        flags = " x ".join(flag_of(name) for name in names)
        yield bad_value(flags, parts, problem, remedy or f"choose {divisors(whole)}")


@rule("processes", "inference processes")
def processes(config: Config, world_size: int) -> Refusals:
    """Every replica has the same number of processes, and so has every copy of the experts."""
    sizes = (TP, PP, CP) if config.parallel.context_parallel_size > 1 else (TP, PP)
    experts, items = _product(config, ETP, PP), "the {} processes of the run"
    remedy = f"choose sizes whose product is {divisors(world_size)}"
    or_more = f"{remedy}, or start a multiple of {_product(config, *sizes)} processes"
    yield from _divide(config, world_size, items, *sizes, remedy=or_more)
    yield from _divide(config, world_size, items, ETP, PP, remedy=remedy)
    rest = f"{world_size} processes / (expert tensor x pipeline size {experts})"
    yield from _divide(config, world_size // experts, rest, EP)


@rule("processes")
def batches(config: Config, world_size: int) -> Refusals:
    """Processes get equally many prompts and whole rows, and rollouts feed whole updates."""
    training, cp = config.training, config.parallel.context_parallel_size
    dp = world_size // _product(config, TP, PP, CP)
    replicas = dp if config.shares_tokens_in_rollouts else dp * cp
    batch, unit = training.global_batch_size, training.micro_batch_size * dp
    rolling_out = f"the data-parallel size {replicas}"
    if replicas > dp:
        rolling_out = f"the {replicas} replicas that roll out (data {dp} x context-parallel {cp})"
    if batch % unit:  # first: what remedies this decides about the prompts of a rollout
        product = f"--micro-batch-size {training.micro_batch_size} x data-parallel size {dp}"
        rates = f"--lr-batch-size {config.optimizer.lr_batch_size or batch} for rates by the square"
        remedy = f"choose a multiple of {unit}, with {rates} root of the ratio"
        if unit % batch == 0:  # or the processes that the batch cannot use share its rows
            remedy += f", or --context-parallel-size {cp * unit // batch}"
        yield f"global_batch_size: is no multiple of {product}; {remedy}"
    for number, name in ((batch, f"--global-batch-size {batch}"), (replicas, rolling_out)):
        if config.uses_rollouts and config.rollout.rollout_batch_size % number:
            remedy = f"choose a multiple of {number}"
            if number == replicas > dp and config.rollout.rollout_batch_size % dp == 0:
                remedy += ", or --rollout-context-parallel tokens"
            yield f"rollout_batch_size: is no multiple of {name}; {remedy}"


@rule("models", "inference models")
def experts_exist(config: Config, *models: ModelSizes) -> Refusals:
    """Experts are spread over processes only where some model of the run has them."""
    if all(model.num_moe_experts is None for model in models):
        if config.parallel.expert_model_parallel_size > 1:
            yield "expert_model_parallel_size: the model has no experts; choose 1"
        if config.parallel.expert_tensor_parallel_size is not None:
            yield "expert_tensor_parallel_size: the model has no experts; leave it out"


@rule("model", "inference model")
def parts(config: Config, model: ModelSizes) -> Refusals:
    """Layers, heads and experts are shared evenly by the processes of a replica."""
    shared = {"attention heads": model.num_attention_heads, "query groups": model.num_query_groups}
    if model.num_moe_experts is None:
        shared["feed-forward units"] = model.ffn_hidden_size
    remedy = f"choose {divisors(math.gcd(*shared.values()))}"
    for items, number in shared.items():
        yield from _divide(config, number, f"the model's {{}} {items}", TP, remedy=remedy)
    stages = (PP, VIRTUAL) if value_of(config, VIRTUAL) > 1 else (PP,)
    yield from _divide(config, model.num_layers, "the model's {} layers", *stages)
    yield from _divide(config, model.num_moe_experts, "the model's {} experts", EP)
    yield from _divide(config, model.moe_ffn_hidden_size, "the {} units of an expert", ETP)


@rule("decoding", "inference decoding")
def graphs(config: Config, model: ModelSizes) -> Refusals:
    """Forwards of a model that decodes are recorded where one process holds it, without experts."""
    if config.rollout.rollout_graphs != "on":
        return
    sharing = _product(config, TP, PP, *((CP,) if config.shares_tokens_in_rollouts else ()))
    problems = {
        "the host has a part in dividing tokens over experts": model.num_moe_experts is not None,
        f"messages between the {sharing} processes of a replica are not recorded": sharing > 1,
        "FP8 keeps converted weights beside the model's own": config.model.fp8_format is not None,
    }
    for problem in (problem for problem, holds in problems.items() if holds):
        yield f"rollout_graphs: {problem}; choose auto or off"


def positions(config: Config, model: ModelSizes) -> Refusals:
    """A corpus window, or the longest prompt and response in whole blocks, has positions."""
    block_size, limit = config.model.block_size, model.max_position_embeddings
    prompt, whole = config.data.max_prompt_length, limit // block_size * block_size
    if config.response_source == "corpus":
        if config.data.seq_length > limit:
            yield f"seq_length: exceeds the model's {limit} positions; choose {limit} or less"
    # Examples are measured as they are read.
    elif config.response_source != "data" and prompt + config.longest_response > whole:
        if prompt >= whole:
            problem = f"leaves no room for a response in the model's {limit} positions"
            yield f"max_prompt_length: {problem}; choose less than {whole}"
        given = f"with --max-prompt-length {prompt}, in blocks of {block_size},"
        remedy = f"choose {whole - prompt} or less, or shorter prompts"
        yield f"max_response_length: {given} exceeds the model's {limit} positions; {remedy}"


@rule("model")
def architecture(config: Config, model: ModelSizes) -> Refusals:
    """What is trained fits the model: its layers, its vocabulary and its experts."""
    parallel, recompute, lora = config.parallel, config.model, config.lora
    is_moe, vocab_size = model.num_moe_experts is not None, model.vocab_size
    # Megatron-Core trains mixtures of experts under TP only with sequence parallelism.
    if is_moe and parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        remedy = "add --sequence-parallel or choose --tensor-model-parallel-size 1"
        yield f"sequence_parallel: experts under tensor parallelism need it; {remedy}"
    stage = model.num_layers // _product(config, PP, VIRTUAL)
    if recompute.recompute_granularity == "full" and recompute.recompute_num_layers > stage:
        problem = f"a stage (or each of its virtual stages) has {stage} layers"
        yield f"recompute_num_layers: {problem}; choose 1 to {stage}"
    missing, other = ("mlp", "moe") if is_moe else ("moe", "mlp")
    if missing in recompute.recompute_modules:
        yield f"recompute_modules: no layer of the model has {missing}; choose {other} instead"
    yield from positions(config, model)
    top_k, stores = config.distillation.divergence_top_k, config.distillation.cache_teacher_targets
    if top_k > vocab_size:
        remedy = "choose 0 for the full vocabulary, or fewer tokens"
        yield f"divergence_top_k: is more than the vocabulary of {vocab_size}; {remedy}"
    if top_k == vocab_size and stores:
        yield "divergence_top_k: is the whole vocabulary, too much to store; choose e.g. 16"
    if config.traits.self_distillation and config.self_distillation.teacher_top_k >= vocab_size:
        yield f"teacher_top_k: reaches the vocabulary of {vocab_size}; choose 1 to {vocab_size - 1}"
    # An expert whose adapters are trained lies on one process, and drops none of their inputs.
    adapted = lora.lora_target_modules if lora.lora_rank is not None and is_moe else ()
    if {"linear_fc1", "linear_fc2"} & set(adapted):
        if lora.lora_dropout > 0:
            remedy = "choose 0, or --lora-target-modules linear_qkv,linear_proj"
            yield f"lora_dropout: adapters of experts cannot drop inputs; {remedy}"
        if (etp := config.expert_tensor_parallel_size) > 1:
            remedy = "choose --expert-tensor-parallel-size 1, or linear_qkv,linear_proj"
            yield f"lora_target_modules: experts on {etp} processes have no adapters; {remedy}"
