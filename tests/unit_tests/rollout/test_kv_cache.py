import functools
import math
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed import ProcessGroup
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dlm.models import attention
from megatron_dlm.rollout import kv_cache, tiles
from megatron_dlm.rollout.kv_cache import PREFILL_TILE, CacheView, KVCache
from megatron_dlm.rollout.pages import PAGE_SIZE
from megatron_dlm.rollout.token_shares import TokenShares

HEADS, GROUPS, HEAD_SIZE, FIRST_LAYER = 4, 2, 8, 3
SCALE = 1 / math.sqrt(HEAD_SIZE)


def new_cache(num_pages: int, backend: str = "sdpa", shares: TokenShares | None = None) -> KVCache:
    return KVCache(
        layer_numbers=(FIRST_LAYER, FIRST_LAYER + 1),
        num_pages=num_pages,
        num_attention_heads_per_partition=HEADS,
        num_query_groups_per_partition=GROUPS,
        head_size=HEAD_SIZE,
        dtype=torch.float32,
        device=torch.device("cpu"),
        backend=backend,
        shares=shares,
    )


def dense_attention(
    query: Tensor, keys: Tensor, values: Tensor, start: int, block_size: int, noisy: int
) -> Tensor:
    """Queries [L, n, d] from position `start` on, keys [K, g, d] of their sequence, in float64.

    Those from position `noisy` on see all keys.
    """
    copies = HEADS // GROUPS
    scores = torch.einsum(
        "qhd,khd->hqk", query.double(), keys.double().repeat_interleave(copies, dim=1)
    )
    block_of_query = torch.arange(start, start + len(query)) // block_size
    hidden = torch.arange(len(keys)) // block_size > block_of_query[:, None]
    hidden &= (torch.arange(start, start + len(query)) < noisy)[:, None]
    weights = (scores * SCALE).masked_fill(hidden, -torch.inf).softmax(-1)
    values = values.double().repeat_interleave(copies, dim=1)
    return torch.einsum("hqk,khd->qhd", weights, values).float()


def random_tokens(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    def tensor(heads: int) -> Tensor:
        return torch.randn(count, 1, heads, HEAD_SIZE, generator=generator)

    return tensor(HEADS), tensor(GROUPS), tensor(GROUPS)


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    block_size=st.sampled_from([1, 2, 4]),
    padding=st.integers(0, 3),
    kind=st.sampled_from(
        [("loop", False), ("loop", False), ("sdpa", False), ("sdpa", True), ("flex", True)]
    ),
    grid=st.sampled_from([None, 1]),
    shuffled=st.booleans(),
)
def test_ragged_forwards_against_dense_attention(
    data: st.DataObject,
    block_size: int,
    padding: int,
    kind: tuple[str, bool],
    grid: int | None,
    shuffled: bool,
) -> None:
    """Forwards of any mixture: prompts, single blocks, two blocks, rewritten blocks, idle slots.

    With a causal context, forwards start anywhere, and some end with a noisy block.
    """
    kernel, is_static = kind
    backend = "flex" if kernel == "flex" else "sdpa"
    num_slots, max_pages = data.draw(st.integers(1, 5)), 3
    max_blocks = max_pages * PAGE_SIZE // block_size
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    cache = new_cache(num_slots * max_pages, backend)
    pages = torch.arange(num_slots * max_pages) + 1
    if shuffled:
        pages = pages[torch.randperm(len(pages), generator=generator)]
    tables = pages.view(num_slots, max_pages).numpy()
    shape = (2, num_slots, max_pages * PAGE_SIZE, GROUPS, HEAD_SIZE)
    keys, values = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    written = [0] * num_slots
    for _ in range(3):
        starts, ends, noisy = [], [], []
        for slot in range(num_slots):
            first = data.draw(st.integers(0, written[slot]))
            written[slot] = data.draw(
                st.sampled_from([first, first + 1, first + 2]) | st.integers(first, max_blocks)
            )
            written[slot] = min(written[slot], max_blocks)
            starts.append(first * block_size)
            ends.append(written[slot] * block_size)
            noisy.append(ends[-1])
            if grid == 1 and ends[-1] > starts[-1]:
                noisy[-1] -= block_size * data.draw(st.integers(0, 1))
                starts[-1] = max(starts[-1] - data.draw(st.integers(0, block_size - 1)), 0)
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        with (
            patch.object(kv_cache, "has_static_shapes", lambda device: is_static),
            patch.object(KVCache, "has_loop", kernel == "loop"),
        ):
            view = CacheView(
                cache,
                tables,
                np.array(starts),
                np.array(ends),
                block_size,
                context_block_size=grid,
                noisy_starts=np.array(noisy),
            )
        for layer in range(2):
            query, key, value = random_tokens(sum(lengths) + padding, generator)
            token = 0
            expected = torch.zeros_like(query)
            for slot in range(num_slots):
                span = slice(starts[slot], ends[slot])
                here = slice(token, token + lengths[slot])
                keys[layer, slot, span] = key[here, 0]
                values[layer, slot, span] = value[here, 0]
                if lengths[slot]:
                    expected[here, 0] = dense_attention(
                        query[here, 0],
                        keys[layer, slot, : ends[slot]],
                        values[layer, slot, : ends[slot]],
                        starts[slot],
                        grid or block_size,
                        noisy[slot],
                    )
                token += lengths[slot]
            context = view.attend(FIRST_LAYER + layer, query, key, value, SCALE)
            torch.testing.assert_close(context, expected, rtol=1e-5, atol=1e-5)


class Ranks(NamedTuple):
    """What `TokenShares` asks of a process group before anything is sent."""

    number: int
    count: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.count


def shares_of(ranks: int) -> list[TokenShares]:
    return [TokenShares(cast(ProcessGroup, Ranks(rank, ranks))) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_position_is_kept_by_one_rank(ranks: int) -> None:
    positions = np.arange(5 * ranks * PAGE_SIZE)
    kept = np.stack([shares.keeps(positions) for shares in shares_of(ranks)])
    assert (kept.sum(axis=0) == 1).all()
    assert (kept.sum(axis=1) == 5 * PAGE_SIZE).all()
    before = np.concatenate((np.zeros((ranks, 1)), kept.cumsum(axis=1)), axis=1)
    limits = np.arange(len(positions) + 1)
    for shares, expected in zip(shares_of(ranks), before, strict=True):
        assert (shares.kept_below(limits) == expected).all()


@pytest.mark.parametrize("kind", [("sdpa", False), ("flex", True)])
def test_what_ranks_keep_adds_up_to_all_keys(kind: tuple[str, bool]) -> None:
    """A prompt, a block on a rank that has nothing of another sequence, and two blocks."""
    ranks, block, generator = 3, 4, torch.Generator().manual_seed(0)
    kernel, is_static = kind
    backend = "flex" if kernel == "flex" else "sdpa"
    tables = np.array([[2, 4], [3, 1], [5, 0]])
    keys, values = torch.zeros(2, 3, 2 * ranks * PAGE_SIZE, GROUPS, HEAD_SIZE).unbind()
    caches = [new_cache(5, backend, shares) for shares in shares_of(ranks)]
    for starts, ends in (([0, 0, 0], [120, 60, 4]), ([120, 60, 4], [188, 64, 12])):
        lengths = np.array(ends) - np.array(starts)
        query, key, value = (x[:, 0] for x in random_tokens(int(lengths.sum()), generator))
        parts = []
        for cache in caches:
            with patch.object(kv_cache, "has_static_shapes", lambda device: is_static):
                view = CacheView(cache, tables, np.array(starts), np.array(ends), block)
            parts.append(view.partial(FIRST_LAYER, query, key, value, SCALE))
        contexts, sums = (torch.stack(part) for part in zip(*parts, strict=True))
        found = (contexts * sums.softmax(dim=0)[..., None]).sum(dim=0)
        token = 0
        for slot in range(3):
            here = slice(token, token + lengths[slot])
            token += int(lengths[slot])
            keys[slot, starts[slot] : ends[slot]] = key[here]
            values[slot, starts[slot] : ends[slot]] = value[here]
            known = keys[slot, : ends[slot]], values[slot, : ends[slot]]
            expected = dense_attention(query[here], *known, starts[slot], block, ends[slot])
            torch.testing.assert_close(found[here], expected, rtol=1e-5, atol=1e-5)
        assert (sums == -torch.inf).any()  # of the sequence that is short
        assert not contexts[sums == -torch.inf].any()


class _Copies(TorchDispatchMode):
    """Counts copies of pages and of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.index_select.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("start", [0, 4, 60])
def test_steps_read_pages_where_they_are(start: int) -> None:
    """With the same results, bit for bit, wherever that is and whatever else is decoded."""
    tables, results = np.arange(1, 13).reshape(4, 3), []
    contents = torch.randn(2, 20 * PAGE_SIZE, GROUPS, HEAD_SIZE)
    query, key, value = random_tokens(32, torch.Generator().manual_seed(0))
    pages = torch.arange(1, 20)
    shuffled = pages[torch.randperm(19, generator=torch.Generator().manual_seed(1))]
    for order, chosen in ((pages, [0, 1, 2, 3]), (shuffled, [0, 1, 2, 3]), (pages, [2, 0])):
        cache = new_cache(19)
        cached = cache.layer(FIRST_LAYER).view(2, 20, -1)
        cached[:, order] = contents.view(2, 20, -1)[:, 1:]
        at = torch.cat((torch.zeros(1, dtype=torch.int64), order)).numpy()
        starts = np.full(len(chosen), start)
        view = CacheView(cache, at[tables[chosen]], starts, starts + 8, 4)
        of_rows = (
            x.view(4, 8, 1, -1, HEAD_SIZE)[chosen].flatten(0, 1) for x in (query, key, value)
        )
        with _Copies() as copies:
            found = view.attend(FIRST_LAYER, *of_rows, SCALE)
        assert not copies.count
        results.append(found.view(len(chosen), 8, -1))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0][[2, 0]], results[2])


def test_a_forward_of_padding_only_leaves_the_cache_alone() -> None:
    cache = new_cache(2)
    query, key, value = random_tokens(3, torch.Generator().manual_seed(0))
    none = np.empty(0, dtype=np.int64)
    view = CacheView(cache, np.empty((0, 1), dtype=np.int64), none, none, 4)
    assert not view.attend(FIRST_LAYER, query, key, value, SCALE).any()
    assert not cache.layer(FIRST_LAYER).any()


def test_a_position_after_the_last_page_is_an_error() -> None:
    tables = np.ones((1, 1), dtype=np.int64)
    with pytest.raises(ValueError, match="position 32 is beyond"):
        CacheView(new_cache(1), tables, np.array([0]), np.array([33]), 1)


@pytest.mark.parametrize("block_size", [1, 4])
def test_flex_reads_the_visible_pages_of_each_row_only(
    block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA, tiles that the mask lists as full are read without it, others not at all."""
    masks = []

    def recorded(
        query: Tensor, keys: Tensor, values: Tensor, mask: BlockMask, _: float, *, with_sums: bool
    ) -> tuple[Tensor, None]:
        assert not with_sums
        masks.append(mask)
        return query, None

    monkeypatch.setattr(tiles, "flex_attention_over_pages", recorded)
    tables = torch.randperm(20).add(1).view(5, 4).numpy()
    tables[0, 1:] = 0  # a short sequence
    starts = np.array([8, 60, 0, 96, 20])
    ends = np.array([12, 68, 100, 100 if block_size == 4 else 97, 20])
    view = CacheView(new_cache(20, "flex"), tables, starts, ends, block_size)
    view.attend(FIRST_LAYER, *random_tokens(int((ends - starts).sum()), torch.Generator()), SCALE)
    lengths = ends - starts
    num_tiles = -(-lengths // PREFILL_TILE)
    slots_of_calls = [
        [slot for slot in range(5) if 0 < lengths[slot] <= 2 * block_size],
        [
            slot
            for slot in range(5)
            if lengths[slot] > 2 * block_size
            for _ in range(num_tiles[slot])
        ],
    ]
    for mask, slots in zip(masks, slots_of_calls, strict=True):
        queries = torch.arange(mask.seq_lengths[0])[:, None]
        keys = torch.arange(mask.seq_lengths[1])
        for row, slot in enumerate(slots):
            visible = mask.mask_mod(torch.tensor(row), torch.tensor(0), queries, keys)
            visible = visible.view(len(queries), -1, PAGE_SIZE)
            num_full = int(mask.full_kv_num_blocks[row])
            num_partial = int(mask.kv_num_blocks[row])
            full = mask.full_kv_indices[row, 0, 0, :num_full].tolist()
            partial = mask.kv_indices[row, 0, 0, :num_partial].tolist()
            assert visible[:, full].all()
            assert full + partial == tables[slot, : num_full + num_partial].tolist()
            assert sorted(full + partial) == visible.any(2).any(0).nonzero()[:, 0].tolist()


def test_forwards_of_all_shapes_share_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled without code generation; past eight graphs PyTorch gives up."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # as it is on CUDA
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    attention._compiled_flex_attention.cache_clear()
    compiled = attention._compiled_flex_attention()
    attention._compiled_flex_attention.cache_clear()
    monkeypatch.setattr(kv_cache, "has_static_shapes", lambda device: True)
    tables = torch.arange(1, 33).view(8, 4).numpy()
    for num_pages, block_size, starts, ends in (
        (4, 4, [0], [4]),  # one sequence of one page
        (32, 4, [8, 64, 96], [16, 68, 104]),
        (32, 4, [0, 4], [100, 12]),  # a prompt, and another one's blocks
        (32, 1, [5] * 8, [6] * 8),
        (12, 8, [0, 8, 40], [8, 24, 48]),
    ):
        tokens = random_tokens(sum(ends) - sum(starts), torch.Generator().manual_seed(0))
        results = []
        for backend, attend in (("sdpa", None), ("flex", compiled)):
            monkeypatch.setattr(attention, "flex_attention", attend)
            view = CacheView(
                new_cache(num_pages, backend),
                tables[: len(starts), : -(-num_pages // 8)],
                np.array(starts),
                np.array(ends),
                block_size,
            )
            results.append([view.attend(FIRST_LAYER + i, *tokens, SCALE) for i in range(2)])
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1
