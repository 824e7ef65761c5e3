"""Random Hugging Face models of a few thousand parameters, and prompts for them."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_dlm.config import Config, ParallelConfig
from megatron_dlm.conversion.hf_import import load_hf_weights
from megatron_dlm.models.architecture import read_architecture
from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.parallel import ParallelGroups, initialized
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Prompt, Trajectory

VOCAB_SIZE, EOS, PAD, MASK = 61, 7, 8, 60
SPECIAL_TOKENS = SpecialTokens(EOS, PAD, MASK, vocab_size=VOCAB_SIZE)
SEED = 11

# With weights this large a random model is as sure of some tokens as a trained one.
INITIALIZER_RANGE = 0.2


def save_tiny_model(folder: Path, moe: bool = False, layers: int = 2) -> torch.nn.Module:
    """Write a Hugging Face folder with random weights; returns the `transformers` model."""
    torch.manual_seed(24)
    sizes: dict[str, Any] = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=not moe,
    )
    model: torch.nn.Module
    if moe:
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **sizes,
                moe_intermediate_size=16,
                num_experts=4,
                num_experts_per_tok=2,
                norm_topk_prob=True,
            )
        )
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    model.save_pretrained(folder)
    return model.eval()


def load_model(folder: Path, **parallel: Any) -> DiffusionGPTModel:
    """This rank's part of the model in a folder; Megatron's groups must have been initialised."""
    config = Config(parallel=ParallelConfig(device="cpu", **parallel))
    architecture = read_architecture(folder)
    model = build_model(architecture, config)
    load_hf_weights(model, architecture, folder)
    return model


@contextmanager
def tiny_model(folder: Path) -> Iterator[DiffusionGPTModel]:
    """A random model that is saved in a folder, in a world of one process."""
    save_tiny_model(folder)
    with initialized(Config(parallel=ParallelConfig(device="cpu"))):
        yield load_model(folder)


def make_prompts(lengths: list[int], first_sample: int = 0) -> list[Prompt]:
    """Random prompts; the tokens of a sample depend on its index and length only."""
    prompts = []
    for sample, length in enumerate(lengths, first_sample):
        generator = torch.Generator().manual_seed(sample)
        token_ids = torch.randint(0, MASK, (length,), generator=generator)
        prompts.append(Prompt(sample, token_ids, {"id": sample}))
    return prompts


GENERATION = GenerationConfig(
    block_size=4,
    remasking_strategy="low_confidence_dynamic",
    dynamic_threshold=0.6,
    denoising_steps_per_block=4,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    max_running_requests=3,
)

SPECULATIVE = {"context_attention": "causal", "remasking_strategy": "speculative"}
"""What a decoding setting is changed by."""

FULL_ATTENTION = dataclasses.replace(
    GENERATION,
    attention_pattern="full",
    block_size=None,
    remasking_strategy="entropy",
    denoising_steps_per_block=None,
)


def make_engine(
    model: torch.nn.Module,
    generation: GenerationConfig = GENERATION,
    groups: ParallelGroups | None = None,
    special_tokens: SpecialTokens = SPECIAL_TOKENS,
    keeps_confidence: bool = False,
    stop: StopAgreement | None = None,
    **changes: Any,
) -> RolloutEngine:
    """An engine for a tiny model; `changes` are to the decoding settings."""
    return RolloutEngine(
        model,
        generation=dataclasses.replace(generation, **changes),
        special_tokens=special_tokens,
        seed=SEED,
        groups=groups or ParallelGroups.from_parallel_state(),
        keeps_confidence=keeps_confidence,
        stop=stop,
    )


def fields(trajectory: Trajectory) -> tuple:
    """What must not depend on the batch."""
    return (
        trajectory.sample_index,
        trajectory.prompt_ids.tolist(),
        trajectory.response_ids.tolist(),
        trajectory.unmask_step.tolist(),
        trajectory.tail_ids.tolist(),
        trajectory.tail_unmask_step.tolist(),
        trajectory.finish_reason,
        trajectory.denoising_forwards,
    )


def several_ends(ids: tuple[int, ...]) -> SpecialTokens:
    """Special tokens of a model whose responses end at any of some ids."""
    return dataclasses.replace(SPECIAL_TOKENS, eos_token_ids=ids)
