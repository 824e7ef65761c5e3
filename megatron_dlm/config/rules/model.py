"""Rules between a configuration and the sizes of the model it is for, beside its layout."""

from __future__ import annotations

import math

from megatron_dlm.config.rules.registry import Stage, rule
from megatron_dlm.config.rules.support import refuse
from megatron_dlm.config.schema import Config
from megatron_dlm.types.model_sizes import ModelSizes


@rule(Stage.ARCHITECTURE)
def check_moe_sequence_parallel(config: Config, model: ModelSizes) -> None:
    """Megatron-Core trains mixtures of experts under TP only with sequence parallelism."""
    parallel = config.parallel
    is_moe = model.num_moe_experts is not None
    if is_moe and parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise refuse(
            config,
            "sequence_parallel",
            "a mixture of experts under tensor parallelism needs it",
            "add --sequence-parallel or choose --tensor-model-parallel-size 1",
        )


@rule(Stage.ARCHITECTURE)
def check_recompute_layers(config: Config, model: ModelSizes) -> None:
    """A recomputed chunk is not larger than a pipeline stage."""
    recompute = config.model
    stage = model.num_layers // config.parallel.pipeline_model_parallel_size
    if recompute.recompute_granularity == "full" and recompute.recompute_num_layers > stage:
        raise refuse(
            config,
            "recompute_num_layers",
            f"is more than the {stage} layers of a pipeline stage",
            f"choose 1 to {stage}",
        )


@rule(Stage.ARCHITECTURE, "training", "teacher")
def check_sequence_length(config: Config, model: ModelSizes) -> None:
    """A corpus window, or the longest prompt and response in whole blocks, has positions."""
    if config.response_source == "data":
        return  # examples are measured as they are read
    block_size, limit = config.model.block_size, model.max_position_embeddings
    if config.response_source == "corpus":
        if config.data.seq_length > limit:
            raise refuse(
                config,
                "seq_length",
                f"exceeds the model's {limit} positions",
                f"choose {limit} or less",
            )
        return
    prompt, response = config.data.max_prompt_length, config.longest_response
    if math.ceil((prompt + response) / block_size) * block_size <= limit:
        return
    room = limit // block_size * block_size - prompt
    if room >= 1:
        raise refuse(
            config,
            "max_response_length",
            f"with --max-prompt-length {prompt}, in blocks of {block_size}, exceeds the model's "
            f"{limit} positions",
            f"choose {room} or less, or shorter prompts",
        )
    raise refuse(
        config,
        "max_prompt_length",
        f"leaves no room for a response in the model's {limit} positions",
        f"choose less than {limit // block_size * block_size}",
    )


@rule(Stage.ARCHITECTURE)
def check_divergence_top_k(config: Config, model: ModelSizes) -> None:
    """The teacher's k most likely tokens exist."""
    if config.distillation.divergence_top_k > model.vocab_size:
        raise refuse(
            config,
            "divergence_top_k",
            f"is more than the vocabulary of {model.vocab_size}",
            "choose 0 for the full vocabulary, or fewer tokens",
        )
    stores_all = config.distillation.divergence_top_k == model.vocab_size
    if stores_all and config.distillation.cache_teacher_targets:
        raise refuse(
            config,
            "divergence_top_k",
            "is the whole vocabulary, which --cache-teacher-targets cannot store",
            "choose e.g. 16",
        )


@rule(Stage.ARCHITECTURE)
def check_teacher_top_k(config: Config, model: ModelSizes) -> None:
    """A teacher that shows its k most likely tokens leaves some out."""
    top_k, vocab_size = config.self_distillation.teacher_top_k, model.vocab_size
    if config.traits.self_distillation and top_k >= vocab_size:
        raise refuse(
            config,
            "teacher_top_k",
            f"leaves nothing out of a vocabulary of {vocab_size}",
            f"choose 1 to {vocab_size - 1}",
        )


@rule(Stage.ARCHITECTURE)
def check_expert_adapters(config: Config, model: ModelSizes) -> None:
    """An expert with adapters lies on one process, and drops none of their inputs."""
    if config.lora.lora_rank is None or model.num_moe_experts is None:
        return
    targets = config.lora.lora_target_modules
    if not any(name in targets for name in ("linear_fc1", "linear_fc2")):
        return
    if config.lora.lora_dropout > 0:
        raise refuse(
            config,
            "lora_dropout",
            "tokens that are dealt out to experts lose what decides what is dropped",
            "choose 0, or --lora-target-modules linear_qkv,linear_proj",
        )
    if config.expert_tensor_parallel_size > 1:
        raise refuse(
            config,
            "lora_target_modules",
            f"experts split over {config.expert_tensor_parallel_size} processes have no adapters",
            "choose --expert-tensor-parallel-size 1, or linear_qkv,linear_proj",
        )
