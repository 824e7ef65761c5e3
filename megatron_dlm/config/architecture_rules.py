"""Rules between a configuration and the sizes of the model it is for: one function a rule."""

from __future__ import annotations

import math
from typing import Protocol

from megatron_dlm.config.rule_support import divisors, refuse
from megatron_dlm.config.schema import Config
from megatron_dlm.errors import UserError, bad_value


class ArchitectureSizes(Protocol):
    """What the rules read of `megatron_dlm.models.architecture.Architecture`."""

    @property
    def num_layers(self) -> int:
        """Transformer layers."""

    @property
    def num_attention_heads(self) -> int:
        """Query heads of a layer."""

    @property
    def num_query_groups(self) -> int:
        """Key/value heads of a layer."""

    @property
    def ffn_hidden_size(self) -> int:
        """Inner size of a dense feed-forward layer."""

    @property
    def moe_ffn_hidden_size(self) -> int | None:
        """Inner size of one expert; None for a dense model."""

    @property
    def num_moe_experts(self) -> int | None:
        """Experts of a layer; None for a dense model."""

    @property
    def vocab_size(self) -> int:
        """Vocabulary entries, without padding for tensor parallelism."""

    @property
    def max_position_embeddings(self) -> int:
        """Longest sequence in tokens."""


def validate_architecture(
    config: Config, student: ArchitectureSizes, teacher: ArchitectureSizes | None = None
) -> None:
    """Check every rule that depends on the models' sizes; weights are not needed.

    Args:
        config: The configuration.
        student: What is trained.
        teacher: What is only run beside it, if anything is.

    Raises:
        UserError: The first rule that is broken, with the values that would work.
    """
    check_tensor_parallel(config, student)
    check_pipeline_parallel(config, student)
    check_experts_exist(config, *([student] if teacher is None else [student, teacher]))
    check_expert_parallel(config, student)
    check_expert_tensor_parallel(config, student)
    check_moe_sequence_parallel(config, student)
    check_recompute_layers(config, student)
    check_sequence_length(config, student)
    check_divergence_top_k(config, student)
    check_teacher_top_k(config, student)
    check_expert_adapters(config, student)
    if teacher is not None:
        _validate_teacher(config, teacher)


def _validate_teacher(config: Config, teacher: ArchitectureSizes) -> None:
    """Check what has to hold for a model that is run and never trained."""
    try:
        check_tensor_parallel(config, teacher)
        check_pipeline_parallel(config, teacher)
        check_expert_parallel(config, teacher)
        check_expert_tensor_parallel(config, teacher)
        check_sequence_length(config, teacher)
    except UserError as error:
        raise UserError(f"--teacher-load {config.teacher_load}: {error}") from None


def check_tensor_parallel(config: Config, architecture: ArchitectureSizes) -> None:
    """Heads, query groups and the feed-forward layer split evenly over TP."""
    split = {
        "attention heads": architecture.num_attention_heads,
        "query groups": architecture.num_query_groups,
    }
    if architecture.num_moe_experts is None:
        split["feed-forward units"] = architecture.ffn_hidden_size
    size = config.parallel.tensor_model_parallel_size
    for what, number in split.items():
        if number % size:
            raise refuse(
                config,
                "tensor_model_parallel_size",
                f"does not divide the model's {number} {what}",
                f"choose {divisors(math.gcd(*split.values()))}",
            )


def check_pipeline_parallel(config: Config, architecture: ArchitectureSizes) -> None:
    """Every pipeline stage has the same number of layers."""
    if architecture.num_layers % config.parallel.pipeline_model_parallel_size:
        raise refuse(
            config,
            "pipeline_model_parallel_size",
            f"does not divide the model's {architecture.num_layers} layers",
            f"choose {divisors(architecture.num_layers)}",
        )


def check_experts_exist(config: Config, *models: ArchitectureSizes) -> None:
    """Experts are spread over processes only where some model of the run has them."""
    if any(model.num_moe_experts is not None for model in models):
        return
    if config.parallel.expert_model_parallel_size > 1:
        raise refuse(config, "expert_model_parallel_size", "the model has no experts", "choose 1")
    if config.parallel.expert_tensor_parallel_size is not None:
        raise refuse(
            config, "expert_tensor_parallel_size", "the model has no experts", "leave it out"
        )


def check_expert_parallel(config: Config, architecture: ArchitectureSizes) -> None:
    """Experts split evenly over EP."""
    size, experts = config.parallel.expert_model_parallel_size, architecture.num_moe_experts
    if experts is not None and experts % size:
        raise refuse(
            config,
            "expert_model_parallel_size",
            f"does not divide the model's {experts} experts",
            f"choose {divisors(experts)}",
        )


def check_expert_tensor_parallel(config: Config, architecture: ArchitectureSizes) -> None:
    """An expert splits evenly over the processes that share it."""
    units, size = architecture.moe_ffn_hidden_size, config.expert_tensor_parallel_size
    if units is not None and units % size:
        raise bad_value(
            "--expert-tensor-parallel-size",
            size,
            f"does not divide the {units} units of an expert",
            f"choose {divisors(units)}",
        )


def check_moe_sequence_parallel(config: Config, architecture: ArchitectureSizes) -> None:
    """Megatron-Core trains mixtures of experts under TP only with sequence parallelism."""
    parallel = config.parallel
    is_moe = architecture.num_moe_experts is not None
    if is_moe and parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise refuse(
            config,
            "sequence_parallel",
            "a mixture of experts under tensor parallelism needs it",
            "add --sequence-parallel or choose --tensor-model-parallel-size 1",
        )


def check_recompute_layers(config: Config, architecture: ArchitectureSizes) -> None:
    """A recomputed chunk is not larger than a pipeline stage."""
    model = config.model
    stage = architecture.num_layers // config.parallel.pipeline_model_parallel_size
    if model.recompute_granularity == "full" and model.recompute_num_layers > stage:
        raise refuse(
            config,
            "recompute_num_layers",
            f"is more than the {stage} layers of a pipeline stage",
            f"choose 1 to {stage}",
        )


def check_sequence_length(config: Config, architecture: ArchitectureSizes) -> None:
    """A corpus window, or the longest prompt and response in whole blocks, has positions."""
    if config.response_source == "data":
        return  # examples are measured as they are read
    block_size, limit = config.model.block_size, architecture.max_position_embeddings
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


def check_divergence_top_k(config: Config, architecture: ArchitectureSizes) -> None:
    """The teacher's k most likely tokens exist."""
    if config.distillation.divergence_top_k > architecture.vocab_size:
        raise refuse(
            config,
            "divergence_top_k",
            f"is more than the vocabulary of {architecture.vocab_size}",
            "choose 0 for the full vocabulary, or fewer tokens",
        )
    stores_all = config.distillation.divergence_top_k == architecture.vocab_size
    if stores_all and config.distillation.cache_teacher_targets:
        raise refuse(
            config,
            "divergence_top_k",
            "is the whole vocabulary, which --cache-teacher-targets cannot store",
            "choose e.g. 16",
        )


def check_teacher_top_k(config: Config, architecture: ArchitectureSizes) -> None:
    """A teacher that shows its k most likely tokens leaves some out."""
    top_k, vocab_size = config.self_distillation.teacher_top_k, architecture.vocab_size
    if config.traits.self_distillation and top_k >= vocab_size:
        raise refuse(
            config,
            "teacher_top_k",
            f"leaves nothing out of a vocabulary of {vocab_size}",
            f"choose 1 to {vocab_size - 1}",
        )


def check_expert_adapters(config: Config, architecture: ArchitectureSizes) -> None:
    """An expert with adapters lies on one process, and drops none of their inputs."""
    if config.lora.lora_rank is None or architecture.num_moe_experts is None:
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
