"""Decoding that verifies its drafts against the autoregressive mode of the same weights.

The references run transformers, or whole sequences without a cache, and know dense distributions.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_dlm.config import Config, ParallelConfig
from megatron_dlm.errors import UserError
from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.parallel import initialized
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.uniforms import counter_uniforms
from megatron_dlm.types.trajectory import Prompt, Trajectory, VerificationRound
from tests.unit_tests.rollout.autoregressive_reference import (
    FEW,
    FEW_SIZES,
    chi_square,
    enumerated,
    filtered,
    next_tokens,
)
from tests.unit_tests.rollout.tiny_models import (
    EOS,
    GENERATION,
    MASK,
    SEED,
    SPECULATIVE,
    fields,
    load_model,
    make_engine,
    make_prompts,
    save_tiny_model,
    several_ends,
)

LENGTHS = [5, 1, 8, 13, 2, 4, 11, 7, 32]


class Models(NamedTuple):
    """Models as this framework and as transformers run them; one of them of few tokens."""

    ours: DiffusionGPTModel
    reference: torch.nn.Module
    few: DiffusionGPTModel
    few_reference: torch.nn.Module


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    folder, few = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("few")
    reference = save_tiny_model(folder)
    few_reference = _save_model_of_few_tokens(few)
    with initialized(Config(parallel=ParallelConfig(device="cpu"))):
        yield Models(load_model(folder), reference, load_model(few), few_reference)


def _save_model_of_few_tokens(folder: Path) -> torch.nn.Module:
    torch.manual_seed(3)
    config = Qwen3Config(**FEW_SIZES, max_position_embeddings=64, initializer_range=0.4)
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def denoised(model: torch.nn.Module, context: list[int], block: list[int]) -> Tensor:
    """Logits [B, V] of a block that sees all of itself, after a causal context."""
    length, size = len(context) + len(block), len(block)
    visible = torch.ones(length, length).tril().bool()
    visible[-size:] = True
    bias = torch.zeros(length, length).masked_fill(~visible, -torch.inf)
    logits = model(torch.tensor([context + block]), attention_mask=bias[None, None]).logits
    logits[..., MASK] = -torch.inf
    return logits[0, -size:]


def inverse_cdf(p: Tensor, uniform: float) -> int:
    return int((p.cumsum(-1) <= uniform * p.sum()).sum())


def uniform(sample_index: int, position: int, step: int) -> float:
    return float(
        counter_uniforms(SEED, *(torch.tensor([n]) for n in (sample_index, position, step)))
    )


class Decoded(NamedTuple):
    """A sequence, what it took, and how it came about."""

    response: list[int]
    forwards: int
    drafted: int
    accepted: int
    rounds: tuple[VerificationRound, ...]
    confidence: list[float]


def decode(
    model: torch.nn.Module, generation: GenerationConfig, prompt: Prompt, limit: int
) -> Decoded:
    """One sequence from the definition."""
    size, temperature = generation.block_size or 0, generation.temperature
    filters = (temperature, generation.top_k, generation.top_p)
    tokens, end = prompt.token_ids.tolist(), len(prompt.token_ids) + limit
    forwards = drafted = accepted = 0
    step, block = 0, -1
    rounds: list[VerificationRound] = []
    confidence: list[float] = []
    while True:
        start = len(tokens) // size * size
        step, block = (0, start) if start != block else (step, block)
        context, draft = tokens[:start], tokens[start:]
        proposals: list[Tensor] = []
        missing = size - len(draft)
        left = min(end, start + size) - len(tokens)
        while len(draft) < size and left > 1:
            step, forwards = step + 1, forwards + 1
            state = draft + [MASK] * (size - len(draft))
            logits = denoised(model, context, state)
            for _ in range(min(-(-missing // generation.draft_steps), size - len(draft))):
                column = len(draft)
                q = filtered(logits[column], *filters)
                proposals.append(q)
                number = uniform(prompt.sample_index, start + column, step)
                draft.append(inverse_cdf(q, number))
        step, forwards = step + 1, forwards + 1
        target = next_tokens(model, context + draft, MASK)
        first, before = len(tokens), accepted
        verified = draft[first - start :][: left if left > 1 else 0]
        while len(tokens) < end:
            position = len(tokens)
            p = filtered(target[position - 1], *filters)
            number = uniform(prompt.sample_index, position, -step)
            if position == start + size or left == 1:
                tokens.append(inverse_cdf(p, number))
                break
            q, token = proposals[position - start - size], draft[position - start]
            drafted += 1
            if uniform(prompt.sample_index, position, step) * q[token] < p[token]:
                tokens.append(token)
                accepted += 1
                continue
            drafted += min(end, start + size) - position - 1
            tokens.append(inverse_cdf((p - q).clamp(min=0), number))
            break
        confidence += [
            float(target[position - 1].softmax(-1)[token])
            for position, token in enumerate(tokens[first:], first)
        ]
        is_drawn = len(tokens) - first > accepted - before
        rounds.append(
            VerificationRound(
                first=first - len(prompt.token_ids),
                forward=forwards,
                draft_ids=tuple(verified),
                num_accepted=accepted - before,
                next_id=tokens[-1] if is_drawn else None,
            )
        )
        response = tokens[len(prompt.token_ids) :]
        figures = (forwards, drafted, accepted, tuple(rounds))
        if EOS in response:
            # Drafts after it were verified in the same forward.
            length = response.index(EOS) + 1
            return Decoded(response[:length], *figures, confidence[:length])
        if len(tokens) >= end:
            return Decoded(response, *figures, confidence)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"draft_steps": 2},
        {"temperature": 4.0, "block_size": 3, "draft_steps": 5},
        {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "block_size": 8},
        {"temperature": 30.0, "block_size": 2},
    ],
    ids=str,
)
def test_cached_decoding_equals_full_forwards(models: Models, changes: dict[str, Any]) -> None:
    engine = make_engine(models.ours, **SPECULATIVE, **changes, keeps_confidence=True)
    prompts = make_prompts(LENGTHS)
    trajectories = engine.generate(prompts, 18)
    for prompt, found in zip(prompts, trajectories, strict=True):
        expected = decode(models.reference, engine.generation, prompt, 18)
        response, *counts = expected[:4]
        assert found.rounds == expected.rounds
        assert found.confidence is not None
        assert found.confidence.tolist() == pytest.approx(expected.confidence, rel=1e-4)
        assert found.response_ids.tolist() == response
        numbers = [found.denoising_forwards, found.drafted_tokens, found.accepted_tokens]
        assert numbers == counts
        assert found.finish_reason == ("eos" if response[-1] == EOS else "length")
        assert not found.is_rollout
        assert len(found.tail_ids) == 0
        assert len(found.unmask_step) == len(response)


@pytest.mark.parametrize(
    "changes",
    [{}, {"block_size": 2}, {"block_size": 8, "draft_steps": 3}, {"chunked_prefill_size": 4}],
    ids=str,
)
@pytest.mark.slow
def test_without_temperature_it_writes_what_next_token_decoding_writes(
    models: Models, changes: dict[str, Any]
) -> None:
    prompts, ends = make_prompts([*LENGTHS, 64, 65]), several_ends((EOS, 3, 20))
    generation = GenerationConfig.autoregressive(temperature=0.0, max_running_requests=3)
    expected = make_engine(models.ours, generation, special_tokens=ends).generate(prompts, 13)
    engine = make_engine(
        models.ours, **SPECULATIVE, temperature=0.0, special_tokens=ends, **changes
    )

    def written(trajectories: list[Trajectory]) -> list[tuple]:
        return [fields(t)[:-1] for t in trajectories]  # not the number of forwards

    assert written(engine.generate(prompts, 13)) == written(expected)
    assert {t.finish_reason for t in expected} == {"eos", "length"}
    tokens = prompts[0].token_ids.tolist()
    for token in expected[0].response_ids.tolist():
        assert int(next_tokens(models.reference, tokens, MASK)[-1].argmax()) == token
        tokens.append(token)


@pytest.mark.parametrize(
    ("changes", "prompt_length", "drafts_are"),
    [
        ({"block_size": 4, "temperature": 0.3}, 5, "bad"),
        ({"block_size": 2, "temperature": 1.0}, 3, "fair"),
        ({"block_size": 4, "temperature": 1.0, "draft_steps": 2}, 4, "fair"),
        ({"block_size": 4, "temperature": 6.0}, 4, "good"),
        ({"block_size": 3, "temperature": 1.0, "top_k": 3}, 3, "fair"),
        ({"block_size": 4, "temperature": 2.0, "top_p": 0.7}, 6, "fair"),
    ],
    ids=str,
)
@pytest.mark.slow
def test_the_distribution_is_the_autoregressive_one(
    models: Models, changes: dict[str, Any], prompt_length: int, drafts_are: str
) -> None:
    """Of whole responses, however good the drafts are; they alone have another distribution."""
    limit, tokens = 3, [0, 2, 1, 3, 3, 1, 2][:prompt_length]
    prompts = [Prompt(i, torch.tensor(tokens)) for i in range(4000)]
    filters = (changes["temperature"], changes.get("top_k", 0), changes.get("top_p", 1.0))
    expected = enumerated(models.few_reference, tokens, limit, filters)
    settings = {**changes, "max_running_requests": len(prompts), "special_tokens": FEW}
    found = make_engine(models.few, **SPECULATIVE, **settings).generate(prompts, limit)
    assert abs(chi_square([t.response_ids.tolist() for t in found], expected)) < 4
    rate = sum(t.accepted_tokens for t in found) / sum(t.drafted_tokens for t in found)
    low, high = {"bad": (0.0, 0.7), "fair": (0.2, 0.95), "good": (0.85, 1.0)}[drafts_are]
    assert low < rate < high
    if drafts_are == "bad":
        drafts = {**settings, "remasking_strategy": "low_confidence_static"}
        drafts |= {"context_attention": "causal", "denoising_steps_per_block": 1}
        by_diffusion = make_engine(models.few, **drafts).generate(prompts, limit)
        with pytest.raises(AssertionError):
            assert abs(chi_square([t.response_ids.tolist() for t in by_diffusion], expected)) < 4


def test_models_without_an_autoregressive_mode_are_refused() -> None:
    with pytest.raises(UserError, match=r"--remasking-strategy = 'speculative': verifies drafts"):
        dataclasses.replace(GENERATION, remasking_strategy="speculative")
    with pytest.raises(UserError, match=r"--block-size = 1: leaves speculative nothing to draft"):
        dataclasses.replace(GENERATION, block_size=1, denoising_steps_per_block=1, **SPECULATIVE)


def test_an_empty_prompt_has_nothing_to_predict_from(models: Models) -> None:
    engine = make_engine(models.ours, **SPECULATIVE)
    empty = Prompt(0, torch.empty(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="sample 0 has no token to predict from"):
        engine.generate([empty], 3)
    with engine.evaluating():
        batch = engine.open(1, [8], 3)
        with pytest.raises(ValueError, match="sample 0 has no token to predict from"):
            batch.admit(0, empty)
