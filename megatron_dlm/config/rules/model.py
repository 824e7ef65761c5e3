"""Rules between a configuration, its processes and the sizes of the model it is for."""

import math

from megatron_dlm.config.fields import flag_of
from megatron_dlm.config.rules import Refusals, divisors
from megatron_dlm.config.schema import Config
from megatron_dlm.errors import bad_value
from megatron_dlm.types.model_sizes import ModelSizes


def _divide(whole: int | None, items: str, remedy: str = "", **sizes: int) -> Refusals:
    """Some items, of which there may be none, are shared evenly by the product of some sizes."""
    parts = math.prod(sizes.values())
    if whole is not None and whole % parts:
        names = " x ".join(flag_of(name) for name in sizes)
        problem = f"does not divide {items.format(whole)}"
        yield bad_value(names, parts, problem, remedy or f"choose {divisors(whole)}")


def processes(config: Config, world_size: int) -> Refusals:
    """Every replica has the same number of processes, and so has every copy of the experts."""
    parallel, etp = config.parallel, config.expert_tensor_parallel_size
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp = parallel.context_parallel_size
    dense = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    if cp > 1:
        dense["context_parallel_size"] = cp
    experts = {"expert_tensor_parallel_size": etp, "pipeline_model_parallel_size": pp}
    all_processes = "the {} processes of the run"
    remedy = f"choose sizes whose product is {divisors(world_size)}"
    or_more = f"{remedy}, or start a multiple of {tp * pp * cp} processes"
    yield from _divide(world_size, all_processes, or_more, **dense)
    yield from _divide(world_size, all_processes, remedy, **experts)
    rest = f"{world_size} processes / (expert tensor x pipeline size {etp * pp})"
    ep = parallel.expert_model_parallel_size
    yield from _divide(world_size // (etp * pp), rest, expert_model_parallel_size=ep)


def batches(config: Config, world_size: int) -> Refusals:
    """Processes get equally many prompts and whole rows, and rollouts feed whole updates."""
    training, parallel = config.training, config.parallel
    size = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    replicas, cp = world_size // size, parallel.context_parallel_size
    dp = replicas // cp
    batch, unit = training.global_batch_size, training.micro_batch_size * dp
    rolling_out = f"the data-parallel size {replicas}"
    if cp > 1:
        rolling_out = f"the {replicas} replicas that roll out (data {dp} x context-parallel {cp})"
    for number, name in ((batch, f"--global-batch-size {batch}"), (replicas, rolling_out)):
        if config.uses_rollouts and config.rollout.rollout_batch_size % number:
            yield f"rollout_batch_size: is no multiple of {name}; choose a multiple of {number}"
    if batch % unit:
        product = f"--micro-batch-size {training.micro_batch_size} x data-parallel size {dp}"
        remedy = f"choose a multiple of {unit}{_larger_batch(config)}{_more_parts(config, unit)}"
        yield f"global_batch_size: is no multiple of {product}; {remedy}"


def _larger_batch(config: Config) -> str:
    """How a larger batch keeps the learning rates of the one that a recipe states."""
    batch = config.optimizer.lr_batch_size or config.training.global_batch_size
    return f", with --lr-batch-size {batch} for rates by the square root of the ratio"


def _more_parts(config: Config, unit: int) -> str:
    """The context-parallel size at which the processes that the batch cannot use share its rows."""
    size = config.parallel.context_parallel_size
    if unit % config.training.global_batch_size:
        return ""
    return f", or --context-parallel-size {size * unit // config.training.global_batch_size}"


def experts_exist(config: Config, *models: ModelSizes) -> Refusals:
    """Experts are spread over processes only where some model of the run has them."""
    if all(model.num_moe_experts is None for model in models):
        if config.parallel.expert_model_parallel_size > 1:
            yield "expert_model_parallel_size: the model has no experts; choose 1"
        if config.parallel.expert_tensor_parallel_size is not None:
            yield "expert_tensor_parallel_size: the model has no experts; leave it out"


def parts(config: Config, model: ModelSizes) -> Refusals:
    """Layers, heads and experts are shared evenly by the processes of a replica."""
    parallel, etp = config.parallel, config.expert_tensor_parallel_size
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    ep, experts = parallel.expert_model_parallel_size, model.num_moe_experts
    shared = {
        "attention heads": model.num_attention_heads,
        "query groups": model.num_query_groups,
        **({"feed-forward units": model.ffn_hidden_size} if experts is None else {}),
    }
    remedy = f"choose {divisors(math.gcd(*shared.values()))}"
    for items, number in shared.items():
        items = f"the model's {{}} {items}"
        yield from _divide(number, items, remedy, tensor_model_parallel_size=tp)
    layers, units = "the model's {} layers", "the {} units of an expert"
    yield from _divide(model.num_layers, layers, pipeline_model_parallel_size=pp)
    yield from _divide(experts, "the model's {} experts", expert_model_parallel_size=ep)
    yield from _divide(model.moe_ffn_hidden_size, units, expert_tensor_parallel_size=etp)


def positions(config: Config, model: ModelSizes) -> Refusals:
    """A corpus window, or the longest prompt and response in whole blocks, has positions."""
    block_size, limit = config.model.block_size, model.max_position_embeddings
    prompt, response = config.data.max_prompt_length, config.longest_response
    whole = limit // block_size * block_size
    if config.response_source == "corpus":
        if config.data.seq_length > limit:
            yield f"seq_length: exceeds the model's {limit} positions; choose {limit} or less"
    # Examples are measured as they are read.
    elif config.response_source != "data" and prompt + response > whole:
        if prompt >= whole:
            problem = f"leaves no room for a response in the model's {limit} positions"
            yield f"max_prompt_length: {problem}; choose less than {whole}"
        yield (
            f"max_response_length: with --max-prompt-length {prompt}, in blocks of {block_size}, "
            f"exceeds the model's {limit} positions; choose {whole - prompt} or less, or shorter "
            "prompts"
        )


def architecture(config: Config, model: ModelSizes) -> Refusals:
    """What is trained fits the model: its layers, its vocabulary and its experts."""
    parallel, recompute, lora = config.parallel, config.model, config.lora
    distillation, vocab_size = config.distillation, model.vocab_size
    # Megatron-Core trains mixtures of experts under TP only with sequence parallelism.
    splits = parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel
    if model.num_moe_experts is not None and splits:
        yield (
            "sequence_parallel: a mixture of experts under tensor parallelism needs it; "
            "add --sequence-parallel or choose --tensor-model-parallel-size 1"
        )
    stage = model.num_layers // parallel.pipeline_model_parallel_size
    if recompute.recompute_granularity == "full" and recompute.recompute_num_layers > stage:
        problem = f"is more than the {stage} layers of a pipeline stage"
        yield f"recompute_num_layers: {problem}; choose 1 to {stage}"
    missing, other = ("moe", "mlp") if model.num_moe_experts is None else ("mlp", "moe")
    if missing in recompute.recompute_modules:
        problem = f"names {missing}, which no layer of the model has"
        yield f"recompute_modules: {problem}; choose {other} instead"
    yield from positions(config, model)
    if distillation.divergence_top_k > vocab_size:
        problem = f"is more than the vocabulary of {vocab_size}"
        yield f"divergence_top_k: {problem}; choose 0 for the full vocabulary, or fewer tokens"
    if distillation.divergence_top_k == vocab_size and distillation.cache_teacher_targets:
        problem = "is the whole vocabulary, which --cache-teacher-targets cannot store"
        yield f"divergence_top_k: {problem}; choose e.g. 16"
    top_k = config.self_distillation.teacher_top_k
    if config.traits.self_distillation and top_k >= vocab_size:
        problem = f"leaves nothing out of a vocabulary of {vocab_size}"
        yield f"teacher_top_k: {problem}; choose 1 to {vocab_size - 1}"
    # An expert with adapters lies on one process, and drops none of their inputs.
    has_experts = lora.lora_rank is not None and model.num_moe_experts is not None
    if has_experts and {"linear_fc1", "linear_fc2"} & set(lora.lora_target_modules):
        etp = config.expert_tensor_parallel_size
        if lora.lora_dropout > 0:
            yield (
                "lora_dropout: tokens that are dealt out to experts lose what decides what is "
                "dropped; choose 0, or --lora-target-modules linear_qkv,linear_proj"
            )
        if etp > 1:
            problem = f"experts split over {etp} processes have no adapters"
            remedy = "choose --expert-tensor-parallel-size 1, or linear_qkv,linear_proj"
            yield f"lora_target_modules: {problem}; {remedy}"
