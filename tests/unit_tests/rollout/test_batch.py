"""Sequences that come and go have the responses that they have alone."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch

from megatron_dlm.errors import UserError
from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout import context
from megatron_dlm.rollout.block_grid import sequence_length
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.pages import PAGE_SIZE
from megatron_dlm.types.trajectory import Prompt, Trajectory
from tests.unit_tests.rollout.tiny_models import (
    FULL_ATTENTION,
    GENERATION,
    SPECIAL_TOKENS,
    SPECULATIVE,
    VOCAB_SIZE,
    fields,
    make_engine,
    make_prompts,
    tiny_model,
)

MAX_RESPONSE_LENGTH = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionGPTModel]:
    with tiny_model(tmp_path_factory.mktemp("qwen3")) as loaded:
        yield loaded


def engine_of(model: DiffusionGPTModel, generation: GenerationConfig, seed: int) -> RolloutEngine:
    return RolloutEngine(
        model,
        generation=generation,
        special_tokens=SPECIAL_TOKENS,
        seed=seed,
        groups=ParallelGroups.from_parallel_state(),
    )


Request = tuple[Prompt, GenerationConfig, int]


def alone(model: DiffusionGPTModel, request: Request) -> Trajectory:
    """The response by an engine of its own."""
    prompt, generation, seed = request
    [trajectory] = engine_of(model, generation, seed).generate([prompt], MAX_RESPONSE_LENGTH)
    return trajectory


AUTOREGRESSIVE = GenerationConfig.autoregressive(temperature=1.0, max_running_requests=3)
CHANGES: dict[str, tuple[GenerationConfig, list[dict[str, Any]]]] = {
    "block_causal": (
        GENERATION,
        [
            {"temperature": 0.0},
            {"top_k": 5},
            {"remasking_strategy": "low_confidence_static", "denoising_steps_per_block": 2},
            {"temperature": 1.3, "top_p": 0.8, "dynamic_threshold": 0.3},
            {"remasking_strategy": "entropy_bounded", "entropy_bound": 0.5},
        ],
    ),
    "full": (FULL_ATTENTION, [{"temperature": 0.0}, {"top_k": 5}]),
    "causal": (AUTOREGRESSIVE, [{"temperature": 0.0}, {"top_p": 0.7}]),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.slow
def test_settings_and_seeds_of_one_batch_do_not_mix(model: DiffusionGPTModel, kind: str) -> None:
    """More requests than slots, one after the other or together, some ended before their time."""
    generation, changes = CHANGES[kind]
    generation = dataclasses.replace(generation, max_running_requests=3)
    settings = [generation, *(dataclasses.replace(generation, **change) for change in changes)]
    lengths_of_prompts = [5, 3, 8, 13] if kind == "full" else [5, 3, 8, 13, 2, 4]
    prompts = make_prompts(lengths_of_prompts)
    requests = [
        (prompt, settings[i % len(settings)], 2**63 + i // 3) for i, prompt in enumerate(prompts)
    ]
    engine = engine_of(model, generation, seed=1)
    lengths = [sequence_length(p, generation, MAX_RESPONSE_LENGTH) for p in prompts]
    batch = engine.open(3, lengths, MAX_RESPONSE_LENGTH)
    waiting = list(range(len(requests)))
    responses: dict[int, Trajectory] = {}
    seen: dict[int, list[int]] = {}
    cancelled = set()
    states: list[tuple[int, int, list[int], list[bool]]] = []
    with engine.evaluating():
        while waiting or batch.num_active:
            while waiting and batch.admit(waiting[0], *requests[waiting[0]]):
                waiting.pop(0)
            finished, _ = batch.step()
            responses.update(finished)
            for request, tokens in batch.settled():
                before = seen.get(request, [])
                seen[request] = tokens.tolist()
                assert seen[request][: len(before)] == before
                block, masked = batch.block(request)
                states.append((request, len(tokens), block.tolist(), masked.tolist()))
            for request in (1, 5):
                if len(seen.get(request, ())) and request not in {*responses, *cancelled}:
                    assert batch.cancel(request) > 0
                    cancelled |= {request}
    assert batch.num_active == 0
    assert len(responses) == len(requests) - len(cancelled)
    for request, tokens in seen.items():
        expected = alone(model, requests[request])
        whole = torch.cat((expected.response_ids, expected.tail_ids)).tolist()
        assert tokens == whole[: len(tokens)]
        if request in responses:
            assert fields(responses[request]) == fields(expected)
    for request, start, block, masked in states:
        expected = alone(model, requests[request])
        whole = torch.cat((expected.response_ids, expected.tail_ids)).tolist()[start:]
        for token, is_mask, final in zip(block, masked, whole, strict=False):
            assert is_mask or token == final
    assert kind == "causal" or any(not all(masked) for *_, masked in states)
    distinct = {tuple(r.response_ids.tolist()) for r in responses.values()}
    assert len(distinct) > 2
    if kind != "full":
        assert cancelled


TURNS = {
    "block_causal": GENERATION,
    "causal_context": dataclasses.replace(GENERATION, context_attention="causal"),
    "speculative": dataclasses.replace(GENERATION, **SPECULATIVE),
    "causal": AUTOREGRESSIVE,
    "full": dataclasses.replace(FULL_ATTENTION, block_size=4),
}


@pytest.mark.parametrize("kind", TURNS)
@pytest.mark.slow
def test_a_later_turn_computes_what_is_new(model: DiffusionGPTModel, kind: str) -> None:
    """Its prompt begins with that of an earlier one and the answer; both may have been cut."""
    generation, limit = TURNS[kind], 60
    # No response ends by itself.
    endless = dataclasses.replace(SPECIAL_TOKENS, eos_token_id=VOCAB_SIZE, eos_token_ids=())
    engine = make_engine(model, generation, special_tokens=endless)

    def expected(prompt: Prompt) -> Trajectory:
        fresh = make_engine(model, generation, special_tokens=endless)
        [trajectory] = fresh.generate([prompt], limit)
        return trajectory

    def first_forward(prompt: Prompt, kept: int) -> int:
        """Tokens that it computes, with the keys of so many kept."""
        length = len(prompt.token_ids)
        if kind == "full":
            return length + limit
        return (length if kind == "causal" else length // 4 * 4 + 4) - kept

    batch = engine.open(1, [10 * PAGE_SIZE], limit)
    [prompt], [new] = make_prompts([50]), [prompt.token_ids for prompt in make_prompts([9])]
    with engine.evaluating():
        assert batch.admit(0, prompt)
        finished = []
        while not finished:
            finished, _ = batch.step()
        [(_, answer)] = finished
        assert fields(answer) == fields(expected(prompt))
        engine.work.take()
        # 110 tokens are known, of which the last block has no final keys: three pages are kept.
        following = Prompt(3, torch.cat((answer.token_ids, new)))
        assert batch.admit(1, following)
        batch.step()
        assert engine.work.take().tokens == [first_forward(following, 3 * PAGE_SIZE)]
        # The answer is interrupted, and what was final of it is kept too: it ends the fourth page.
        said = torch.empty(0, dtype=torch.int64)
        while len(following.token_ids) + len(said) <= 4 * PAGE_SIZE:
            batch.step()
            [(_, settled)] = batch.settled()
            said = torch.from_numpy(settled.copy())
        batch.cancel(1)
        engine.work.take()
        last = Prompt(4, torch.cat((following.token_ids, said, new)))
        assert batch.admit(2, last)
        finished, _ = batch.step()
        assert engine.work.take().tokens == [first_forward(last, 4 * PAGE_SIZE)]
        while not finished:
            finished, _ = batch.step()
        [(_, again)] = finished
        assert fields(again) == fields(expected(last))


def test_the_cache_takes_no_more_memory_than_there_is(
    model: DiffusionGPTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = model.config
    layer_bytes = 2 * config.num_query_groups * config.kv_channels * 4  # of a position, in float32
    page_bytes = config.num_layers * PAGE_SIZE * layer_bytes
    free = round(5.5 * page_bytes / context.MAX_MEMORY_SHARE)
    monkeypatch.setattr(context.platform, "available_memory", lambda: free)
    engine = engine_of(model, GENERATION, seed=1)
    batch = engine.open(3, [4 * PAGE_SIZE] * 3, MAX_RESPONSE_LENGTH)
    assert batch._slot_groups[0].context.pool.num_pages == 5  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=f"--max-total-tokens.* holds {5 * PAGE_SIZE} tokens"):
        engine.open(3, [6 * PAGE_SIZE], MAX_RESPONSE_LENGTH)


def test_the_memory_of_a_cpu_is_known() -> None:
    assert 0 < context.platform.available_memory() <= psutil.virtual_memory().total


@pytest.mark.parametrize("changes", [{}, {"top_k": 9}, SPECULATIVE], ids=["T", "top-k", "drafts"])
def test_the_last_layer_goes_on_with_what_is_drawn_from(
    model: DiffusionGPTModel, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of its feed-forward part are those of the draws; all where drafts are verified."""
    prompts = make_prompts([5, 9, 2])
    responses = []
    for reads_early in (False, True):
        monkeypatch.setattr(model, "reads_early", reads_early)
        engine = make_engine(model, **changes)
        rows: list[list[int]] = [[], []]
        hooks = [
            layer.mlp.register_forward_hook(
                lambda module, inputs, output, own=own: own.append(len(inputs[0]))
            )
            for own, layer in zip(rows, model.decoder.layers, strict=True)
        ]
        responses.append([fields(t) for t in engine.generate(prompts, 9)])
        for hook in hooks:
            hook.remove()
        work = engine.work.take()
        assert rows == [work.tokens, work.read]
        if not reads_early:
            assert work.read == work.tokens
        elif changes != SPECULATIVE:
            assert work.read == work.logits
            assert sum(work.read) < 0.6 * sum(work.tokens)
    assert responses[0] == responses[1]
