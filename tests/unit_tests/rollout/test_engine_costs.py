"""What a rollout takes: pages, forwards, attention shapes, waits; no result depends on them."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dlm.errors import UserError
from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.rollout import block_draws, kv_cache
from megatron_dlm.rollout.batch import DecodingBatch
from megatron_dlm.rollout.context import CachedContext
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.pages import PAGE_SIZE
from megatron_dlm.rollout.slot_group import SlotGroup
from megatron_dlm.rollout.strategies import STRATEGIES
from megatron_dlm.types.special_tokens import SpecialTokens
from tests.unit_tests.rollout.tiny_models import (
    GENERATION,
    MASK,
    PAD,
    VOCAB_SIZE,
    fields,
    make_engine,
    make_prompts,
    tiny_model,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionGPTModel]:
    with tiny_model(tmp_path_factory.mktemp("qwen3")) as loaded:
        yield loaded


class Forwards:
    """What the forwards of a rollout held: sequences, tokens and free pages of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sequences: list[int] = []
        self.tokens: list[int] = []
        self.pages: list[int] = []
        attention = CachedContext.attention

        def recorded(
            context: CachedContext, starts: np.ndarray, ends: np.ndarray, noisy: np.ndarray
        ) -> Any:
            self.sequences.append(len(starts))
            self.tokens.append(int((ends - starts).sum()))
            self.pages.append(context.pool.num_pages - context.pool.num_free)
            return attention(context, starts, ends, noisy)

        monkeypatch.setattr(CachedContext, "attention", recorded)


def test_prompts_wait_for_pages(model: DiffusionGPTModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-pressure: as many sequences as the budget holds, with the same results."""
    prompts = make_prompts([5, 70, 8, 13, 66, 4])
    expected = [fields(t) for t in make_engine(model, max_running_requests=8).generate(prompts, 14)]
    for tokens, sequences in ((96, 3), (200, 4), (10**9, 6)):
        forwards = Forwards(monkeypatch)
        engine = make_engine(model, max_running_requests=8, max_total_tokens=tokens)
        assert [fields(t) for t in engine.generate(prompts, 14)] == expected
        assert max(forwards.sequences) == sequences
        assert max(forwards.pages) <= tokens // PAGE_SIZE
    engine = make_engine(model, max_total_tokens=95)
    with pytest.raises(UserError, match=r"--max-total-tokens = 95: .* 64 tokens, .* need 96;"):
        engine.generate(prompts, 14)


def test_long_prompts_are_prefilled_in_pieces(
    model: DiffusionGPTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = make_prompts([37, 3, 50, 1, 16])
    engine = make_engine(model, max_running_requests=5, block_size=4)
    expected = [fields(t) for t in engine.generate(prompts, 9)]
    forwards = Forwards(monkeypatch)
    pieces = make_engine(model, max_running_requests=5, block_size=4, chunked_prefill_size=13)
    trajectories = pieces.generate(prompts, 9)
    assert [fields(t) for t in trajectories] == expected
    assert max(forwards.tokens) <= 12 + 5 * 8  # a piece, and two blocks of every sequence
    # Complete blocks of the prompts: 36, 0, 48, 0 and 16 tokens, in pieces of 12.
    extra = [t.total_forwards - t.denoising_forwards for t in trajectories]
    assert extra == [2, 0, 3, 0, 1]
    (alone,) = pieces.generate(prompts[2:3], 9)
    assert alone.total_forwards == trajectories[2].total_forwards


@pytest.mark.parametrize("autoregressive", [False, True])
@pytest.mark.parametrize("piece", [8192, 64])
def test_responses_to_one_prompt_share_its_pages(
    model: DiffusionGPTModel, monkeypatch: pytest.MonkeyPatch, autoregressive: bool, piece: int
) -> None:
    generation = GENERATION
    if autoregressive:
        generation = GenerationConfig.autoregressive(temperature=1.0, max_running_requests=2)
    (first,) = make_prompts([131])
    prompts = [dataclasses.replace(first, sample_index=index) for index in range(4)]
    changes = {"max_running_requests": 3, "chunked_prefill_size": piece}
    alone, tokens = [], 0
    for prompt in prompts:
        forwards = Forwards(monkeypatch)
        alone += make_engine(model, generation, **changes).generate([prompt], 6)
        tokens += sum(forwards.tokens)
    assert len({tuple(t.response_ids.tolist()) for t in alone}) == 4
    forwards = Forwards(monkeypatch)
    together = make_engine(model, generation, **changes).generate(prompts, 6)
    assert [fields(t) for t in together] == [fields(t) for t in alone]
    assert [t.total_forwards for t in together] == [t.total_forwards for t in alone]
    # Four pages of 32 tokens, once for all; each of three sequences has a page of its own.
    assert sum(forwards.tokens) == tokens - 3 * 128
    # (Before they were computed, each had reserved its own.)
    assert max(forwards.pages[1:]) == 4 + 3


class AttentionShapes(TorchDispatchMode):
    """Counts the shapes of queries and keys that attention kernels are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple] = set()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in func.__name__:
            self.calls += 1
            self.shapes.add((func, tuple(args[0].shape), tuple(args[1].shape)))
        return func(*args, **(kwargs or {}))


def test_attention_kernels_see_few_shapes(
    model: DiffusionGPTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4,000 tokens of sequences of many lengths; a shape costs cuDNN or a graph a plan each."""
    lengths = [3 + 13 * index % 150 for index in range(16)]
    prompts = [
        dataclasses.replace(prompt, max_response_length=40 + 28 * index)
        for index, prompt in enumerate(make_prompts(lengths))
    ]
    engine = make_engine(
        model,
        max_running_requests=8,
        remasking_strategy="low_confidence_static",
        denoising_steps_per_block=1,
        special_tokens=SpecialTokens(MASK, PAD, MASK, vocab_size=VOCAB_SIZE),  # no draw is an end
    )
    monkeypatch.setattr(kv_cache, "has_static_shapes", lambda device: True)  # as on a GPU
    with AttentionShapes() as seen:
        trajectories = engine.generate(prompts, 500)
    assert sum(len(t.response_ids) for t in trajectories) == sum(range(40, 40 + 28 * 16, 28)) > 3999
    assert seen.calls > 200
    assert len(seen.shapes) <= 16


class NoWait(TorchDispatchMode):
    """Refuses operations whose result or shape the host would have to wait for on a GPU."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.waiting
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_host_does_not_wait_between_plan_and_report(
    model: DiffusionGPTModel, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    steps = 0

    def watched(step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal steps
            steps += 1
            with NoWait():
                return step(*args)

        return call

    for owner, step in ((DecodingBatch, "_forward"), (SlotGroup, "report")):
        monkeypatch.setattr(owner, step, watched(getattr(owner, step)))
    monkeypatch.setattr(block_draws, "_host_computes", lambda device: False)  # as on a GPU
    engine = make_engine(
        model,
        remasking_strategy=strategy,
        context_attention="causal",
        top_k=9,
        chunked_prefill_size=4,
    )
    engine.generate(make_prompts([5, 1, 14, 2]), 9)
    assert steps > 10
