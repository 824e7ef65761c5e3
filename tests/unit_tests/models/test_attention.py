"""The visibility rule against its definition, and both backends against a dense softmax."""

import functools
import math
from typing import get_args
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from megatron_dlm.models import attention, attention_layout, query_tiles
from megatron_dlm.models.attention import FLEX_TILE, flex_attention_over_row, sdpa_attention
from megatron_dlm.models.attention_layout import (
    DRAW_UNIT,
    LayoutCache,
    block_diffusion_block_ids,
    clean_layout,
    pad_layout,
    pair_draws,
)
from megatron_dlm.models.block_mask import block_mask, tile_visibility
from megatron_dlm.models.query_tiles import tile_batches
from megatron_dlm.types.diffusion_kind import ContextAttention
from tests.unit_tests.models.dense_attention import (
    dense_attention,
    dense_mask,
    in_tiles,
    layouts,
)


@given(layouts())
def test_visible_is_the_rule(layout: torch.Tensor) -> None:
    actual = attention_layout.visible(layout[:, :, None], layout[:, None, :])
    assert torch.equal(actual, dense_mask(layout))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("causal", lambda q, k: k <= q),
        ("full", lambda q, k: True),
        ("block_causal", lambda q, k: k // 3 <= q // 3),
    ],
)
def test_patterns_are_block_ids(pattern: attention_layout.Pattern, expected) -> None:
    layout = clean_layout([7], pattern, block_size=3)
    mask = attention_layout.visible(layout[:, :, None], layout[:, None, :])
    assert mask.tolist() == [[expected(q, k) for k in range(7)] for q in range(7)]


@given(st.integers(1, 5), st.integers(1, 14), st.data())
def test_a_causal_context_by_its_definition(
    block_size: int, length: int, data: st.DataObject
) -> None:
    """By positions alone: clean tokens are causal, a noisy block sees those before it, and itself.

    The other way to lay out the clean stream shows noisy blocks the same.
    """
    noisy = [i for i in range(length) if data.draw(st.booleans()) or i // block_size == 0]
    noisy = [i for i in range(length) if i // block_size in {j // block_size for j in noisy}]
    position = torch.tensor([*range(length), *noisy, *noisy]).int()
    stream = torch.tensor([0] * length + [1] * len(noisy) + [2] * len(noisy)).int()
    masks = {}
    for context in get_args(ContextAttention):
        block = block_diffusion_block_ids(position, stream, block_size, context)
        layout = torch.stack((torch.zeros_like(block), block, stream, position))
        masks[context] = attention_layout.visible(layout[:, :, None], layout[:, None, :])
    for query, (i, s) in enumerate(zip(position.tolist(), stream.tolist(), strict=True)):
        for key, (j, t) in enumerate(zip(position.tolist(), stream.tolist(), strict=True)):
            if s == 0:
                expected = t == 0 and j <= i
            elif t == 0:
                expected = j < i // block_size * block_size
            else:
                expected = s == t and j // block_size == i // block_size
            assert masks["causal"][query, key] == expected, (i, s, j, t)
            if s != 0:
                assert masks["block_causal"][query, key] == expected


def test_draws_of_pairs_are_uniform_and_independent() -> None:
    """Of each query, of each key, of neighbours and of a pair seen from both of its ends."""
    length = 600
    generator = torch.Generator().manual_seed(3)
    keys = torch.randint(0, 2**31 - 1, (length,), generator=generator).int()
    draws = pair_draws(keys[:, None], keys[None, :]).double() / DRAW_UNIT
    assert draws.min() >= 0
    assert draws.max() < 1
    for share in (0.02, 0.5, 0.9):
        seen = (draws < share).double()
        deviation = (share * (1 - share)) ** 0.5
        assert float(seen.mean()) == pytest.approx(share, abs=5 * deviation / length)
        for axis in (0, 1):
            of_a_token = (seen.mean(axis) - share) * length**0.5 / deviation
            assert float(of_a_token.abs().max()) < 5
            assert float(of_a_token.std()) == pytest.approx(1, abs=0.15)
    centred = draws - 0.5
    others = [centred.T, centred.roll(1, 0), centred.roll(1, 1), centred.roll((1, 1), (0, 1))]
    for other in others:
        product = (centred * other).fill_diagonal_(0).mean() * 12
        assert abs(float(product)) < 5 * 2**0.5 / length  # each pair occurs twice in the first


@given(layouts(), st.integers(1, 17))
def test_tables_of_tiles_are_those_of_the_dense_mask(layout: torch.Tensor, tile: int) -> None:
    tables, expected = tile_visibility(layout, layout, tile), in_tiles(dense_mask(layout), tile)
    if len(layout) == 4:
        assert torch.equal(tables.some, expected.any(2))
        assert torch.equal(tables.all, expected.all(2))
    assert not (expected.any(2) & ~tables.some).any()
    assert not (tables.all & ~expected.all(2)).any()


@given(layouts(), st.integers(1, 17))
def test_a_block_mask_shows_what_the_dense_mask_shows(layout: torch.Tensor, tile: int) -> None:
    """Whole tiles unseen, the others as the rule says, both ways round (backward needs columns)."""
    length, tiles = layout.shape[1], -(-layout.shape[1] // tile)
    mask, expected = block_mask(layout, length, length, tile), dense_mask(layout)
    rows, whole, columns = (torch.zeros(tiles, tiles, dtype=torch.bool) for _ in range(3))
    for i in range(tiles):
        rows[i, mask.kv_indices[0, 0, i, : mask.kv_num_blocks[0, 0, i]].long()] = True
        whole[i, mask.full_kv_indices[0, 0, i, : mask.full_kv_num_blocks[0, 0, i]].long()] = True
        columns[mask.q_indices[0, 0, i, : mask.q_num_blocks[0, 0, i]].long(), i] = True
    assert torch.equal(rows, columns)
    assert not (rows & whole).any()
    token = torch.arange(length)
    rule = mask.mask_mod(torch.tensor(0), torch.tensor(0), token[:, None], token[None, :])
    of_tile = token // tile
    partial, full = rows[of_tile][:, of_tile], whole[of_tile][:, of_tile]
    assert torch.equal(full | (partial & rule), expected)


def test_a_row_of_a_tile_takes_the_reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = pad_layout(clean_layout([60, 50], "causal", 1), 3 * FLEX_TILE)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, layout.shape[1], 1, 2, 8, generator=generator).unbind(0)
    long = flex_attention_over_row(*inputs, layout, 1.0)
    monkeypatch.setattr(attention, "flex_attention", None)
    short = flex_attention_over_row(
        *(x[:FLEX_TILE] for x in inputs), layout[:, :FLEX_TILE].contiguous(), 1.0
    )
    assert torch.allclose(long[:FLEX_TILE], short, atol=1e-6)
    assert not long[FLEX_TILE:].any()


def test_rows_of_all_lengths_share_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled without code generation; a row of one tile needs none."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # as it is on CUDA
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.setattr(attention, "flex_attention", attention._compiled_flex_attention())
    attention._compiled_flex_attention.cache_clear()
    for tiles in (1, 2, 3, 5, 9, 4):
        layout = pad_layout(clean_layout([90 * tiles, 20], "block_causal", 4), tiles * FLEX_TILE)
        inputs = torch.randn(3, layout.shape[1], 1, 1, 4).unbind(0)
        expected = sdpa_attention(*inputs, layout, 1.0)
        assert torch.allclose(flex_attention_over_row(*inputs, layout, 1.0), expected, atol=1e-5)
    assert counter.frame_count == 1


@st.composite
def rows_of_three_tiles(draw: st.DrawFn) -> torch.Tensor:
    """A row as training has it: documents with noisy streams, padded to three tiles."""
    parts: list[torch.Tensor] = []
    while sum(part.shape[1] for part in parts) < 2 * FLEX_TILE:
        length, size = draw(st.integers(10, 40)), draw(st.sampled_from([1, 4, 7]))
        clean = clean_layout([length], "block_causal", size)
        noisy = clean[:, draw(st.integers(0, length - 1)) // size * size :].clone()
        noisy[2] = 1
        part = torch.cat((clean, noisy), dim=1)
        part[0] = len(parts)
        parts.append(part)
    return pad_layout(torch.cat(parts, dim=1), 3 * FLEX_TILE)


@settings(max_examples=5)
@given(rows_of_three_tiles())
def test_flex_over_three_tiles_equals_a_dense_softmax(layout: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(layout.shape[1], 1, heads, 8, generator=generator) for heads in (4, 2, 2)
    )
    mask = attention_layout.visible(layout[:, :, None], layout[:, None, :])
    scores = torch.einsum("sbnd,tbnd->bnst", query, key.repeat_interleave(2, 2)).double() * 0.3
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num(0.0)
    expected = torch.einsum("bnst,tbnd->sbnd", weights, value.repeat_interleave(2, 2).double())
    for backend in (sdpa_attention, flex_attention_over_row):
        actual = backend(query, key, value, layout, 0.3)
        assert torch.allclose(actual.double(), expected, atol=1e-5), backend.__name__


@given(layouts(), st.sampled_from([(2, 2), (4, 2), (4, 1)]), st.sampled_from([1, 128]))
def test_sdpa_equals_a_dense_softmax(
    layout: torch.Tensor, heads: tuple[int, int], short: int
) -> None:
    torch.manual_seed(layout.shape[1])
    num_heads, num_groups = heads
    length, head_size = layout.shape[1], 8
    query = torch.randn(length, 1, num_heads, head_size)
    key, value = torch.randn(2, length, 1, num_groups, head_size).unbind(0)
    expected = dense_attention(query.double(), key.double(), value.double(), layout, 0.3)
    with mock.patch.multiple(query_tiles, SHORT=short, TILE=4):
        actual = sdpa_attention(query, key, value, layout, 0.3)
        batches = tile_batches(layout, length, length, cuts=True).batches
    assert torch.allclose(actual.double(), expected, atol=1e-5)
    lengths = layout[0][layout[0] >= 0].bincount()
    assert sum(int((~batch.is_padding).sum()) for batch in batches) == int(lengths.sum())
    padded = sum(batch.mask.numel() for batch in batches)
    assert short > 1 or padded < 4 * int(lengths.square().sum())


@pytest.mark.parametrize(("streams", "most"), [(0, 0.62), (1, 0.36)])
def test_of_long_documents_only_what_tiles_see_is_computed(streams: int, most: float) -> None:
    """All pairs are 1; half of the clean ones are visible, and as many for each noisy stream."""
    position = torch.arange(2048, dtype=torch.int32)
    none = torch.zeros_like(position)
    layout = torch.cat(
        [
            torch.stack((none, position // 4, none + stream, position))
            for stream in range(streams + 1)
        ],
        dim=1,
    )
    length = layout.shape[1]
    (whole,) = tile_batches(layout, length, length, cuts=False).batches
    assert whole.mask.shape == (1, 1, length, length)
    batches = tile_batches(layout, length, length, cuts=True).batches
    assert sum(batch.mask.numel() for batch in batches) < most * length**2
    assert len(batches) <= 12


def test_clean_tokens_that_see_all_of_each_other_are_one_tile() -> None:
    layout = clean_layout([600], "full", 1)
    (batch,) = tile_batches(layout, 600, 600, cuts=True).batches
    assert batch.mask.shape == (1, 1, 600, 600)


@pytest.mark.parametrize("kernel", [True, False])
@given(layouts(), st.sampled_from([1, 128]))
def test_sdpa_gradients_equal_a_dense_softmax(
    kernel: bool, layout: torch.Tensor, short: int
) -> None:
    """With the kernel of the CPU, and as where PyTorch has none for these heads."""
    torch.manual_seed(0)
    length = layout.shape[1]
    inputs = [torch.randn(length, 1, heads, 4, dtype=torch.float64) for heads in (4, 2, 2)]
    weight = torch.randn(length, 1, 4, 4, dtype=torch.float64)
    gradients = []
    for attend in (sdpa_attention, dense_attention):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with (
            mock.patch.multiple(query_tiles, SHORT=short, TILE=4),
            mock.patch.object(attention, "_has_cpu_kernel", return_value=kernel),
        ):
            (attend(*leaves, layout, 0.5) * weight).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for actual, expected in zip(*gradients, strict=True):
        assert torch.allclose(actual, expected, atol=1e-9)


def test_a_row_of_padding_contributes_exactly_zero() -> None:
    layout = pad_layout(torch.zeros(4, 0, dtype=torch.int32), 3)
    query = torch.randn(3, 1, 4, 8, requires_grad=True)
    key, value = torch.randn(2, 3, 1, 2, 8).requires_grad_().unbind(0)
    context = sdpa_attention(query, key, value, layout, 1.0)
    assert torch.equal(context, torch.zeros_like(context))
    context.sum().backward()
    assert torch.equal(query.grad, torch.zeros_like(query))


def test_layout_cache_knows_a_layout_by_its_storage() -> None:
    calls: list[torch.Tensor] = []

    def derive(layout: torch.Tensor) -> int:
        calls.append(layout)
        return int(layout.sum())

    cache = LayoutCache(derive, capacity=2)
    first = torch.ones(4, 5, dtype=torch.int32)
    assert cache(first) == cache(first.detach()) == 20
    assert len(calls) == 1
    # Older layouts are dropped, and a new tensor at a reused address is never taken for an old one.
    for length in range(1, 30):
        assert cache(torch.ones(4, length, dtype=torch.int32)) == 4 * length
