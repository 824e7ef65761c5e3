"""Shares of a row: which rank holds what, attention over all shares together, and their balance."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dlm.accounting.flops import visible_pairs
from megatron_dlm.models.attention import FLEX_TILE, flex_attention_over_row, sdpa_attention
from megatron_dlm.models.attention_layout import clean_layout, queries_and_keys
from megatron_dlm.models.block_mask import tile_visibility
from megatron_dlm.models.context_parallel import Share, share_of_row, token_ranks
from megatron_dlm.models.forward import Row
from tests.unit_tests.models.dense_attention import (
    dense_attention,
    dense_mask,
    in_tiles,
    layouts,
)

RANKS = st.integers(2, 4)


def shares_of(layout: torch.Tensor, ranks: int, multiple: int = 1) -> list[Share]:
    row = Row(torch.arange(layout.shape[1]), layout[3].long(), layout)
    holder = token_ranks(layout, ranks)
    return [share_of_row(row, holder, rank, ranks, multiple) for rank in range(ranks)]


def shared_tokens(share: Share) -> int:
    """Clean tokens of all ranks, padding included."""
    assert isinstance(share.row.attention, torch.Tensor)
    return share.row.attention.shape[1] - len(share.row.token_ids)


def attention_over_shares(
    attend: Callable[..., torch.Tensor],
    shares: list[Share],
    layout: torch.Tensor,
    *inputs: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """What the ranks compute together, each from its tokens and the gathered clean keys."""
    of_ranks = []
    for share in shares:
        source = torch.full((len(share.row.token_ids),), -1)
        held = share.place >= 0
        source[share.place[held]] = held.nonzero()[:, 0]
        is_token = (source >= 0)[:, None, None, None]
        of_ranks.append([torch.where(is_token, x[source.clamp(min=0)], 0.0) for x in inputs])
    own = shared_tokens(shares[0]) // len(shares)
    context = torch.zeros_like(inputs[0])
    for share, (query, key, value) in zip(shares, of_ranks, strict=True):
        if own:
            key, value = (
                torch.cat([*(other[i][:own] for other in of_ranks), x[own:]])
                for i, x in ((1, key), (2, value))
            )
        output = attend(query, key, value, share.row.attention, scale)
        held = (share.place >= 0).nonzero()[:, 0]
        context = context.index_add(0, held, output[share.place[held]])
    return context


@given(layouts(), RANKS, st.integers(1, 4))
def test_each_token_is_on_one_rank_and_each_noisy_block_together(
    layout: torch.Tensor, ranks: int, multiple: int
) -> None:
    shares = shares_of(layout, ranks, multiple)
    holders = torch.stack([share.place >= 0 for share in shares])
    assert torch.equal(holders.sum(0), (layout[0] >= 0).long())
    blocks: dict[tuple[int, ...], set[int]] = {}
    for token in ((layout[0] >= 0) & (layout[2] > 0)).nonzero()[:, 0].tolist():
        block = tuple(layout[:3, token].tolist())
        blocks.setdefault(block, set()).add(int(holders[:, token].long().argmax()))
    assert all(len(ranks_of_block) == 1 for ranks_of_block in blocks.values())
    for share in shares:
        row, held = share.row, (share.place >= 0).nonzero()[:, 0]
        assert len(row.token_ids) % multiple == 0
        assert torch.equal(row.token_ids[share.place[held]], held)
        assert torch.equal(row.position_ids[share.place[held]], layout[3, held].long())
    assert len({shared_tokens(share) for share in shares}) == 1
    assert sum(share.pairs for share in shares) == visible_pairs(layout)


@given(layouts(), RANKS, st.integers(1, 4))
def test_attention_over_shares_equals_a_dense_softmax(
    layout: torch.Tensor, ranks: int, multiple: int
) -> None:
    """Contexts, and gradients of queries, keys and values, in float64."""
    torch.manual_seed(0)
    length = layout.shape[1]
    inputs = [torch.randn(length, 1, heads, 4, dtype=torch.float64) for heads in (4, 2, 2)]
    weight = torch.randn(length, 1, 4, 4, dtype=torch.float64)
    shares, found = shares_of(layout, ranks, multiple), []
    for shared in (True, False):
        leaves = [x.clone().requires_grad_() for x in inputs]
        if shared:
            context = attention_over_shares(sdpa_attention, shares, layout, *leaves, scale=0.5)
        else:
            context = dense_attention(*leaves, layout, 0.5)
        (context * weight).sum().backward()
        found.append([context, *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*found, strict=True):
        assert torch.allclose(actual, expected, atol=1e-9)


@given(layouts(), RANKS, st.integers(1, 17))
def test_tables_of_a_share_are_those_of_the_dense_mask(
    layout: torch.Tensor, ranks: int, tile: int
) -> None:
    for share in shares_of(layout, ranks):
        shared = shared_tokens(share)
        queries = len(share.row.token_ids)
        asking, asked = queries_and_keys(
            share.row.attention, queries, queries + shared - shared // ranks
        )
        tables = tile_visibility(asking, asked, tile)
        expected = in_tiles(dense_mask(asking, asked), tile)
        if len(layout) == 4:
            assert torch.equal(tables.some, expected.any(2))
            assert torch.equal(tables.all, expected.all(2))
        assert not (expected.any(2) & ~tables.some).any()
        assert not (tables.all & ~expected.all(2)).any()


def block_diffusion_layout(lengths: list[int], first_noisy: int, block_size: int) -> torch.Tensor:
    """Documents with a clean stream, and a noisy one from a block on."""
    parts = []
    for document, length in enumerate(lengths):
        clean = clean_layout([length], "block_causal", block_size)
        noisy = clean[:, first_noisy * block_size :].clone()
        noisy[2] = 1
        parts.append(torch.cat((clean[:, : length - block_size], noisy), dim=1))
        parts[-1][0] = document
    return torch.cat(parts, dim=1)


def test_flex_over_shares_equals_the_whole_row() -> None:
    """Shares of several tiles, none of whole ones."""
    torch.manual_seed(0)
    layout = block_diffusion_layout([252, 120], 5, 4)
    length = layout.shape[1]
    inputs = [torch.randn(length, 1, heads, 16) for heads in (4, 2, 2)]
    expected = sdpa_attention(*inputs, layout, 0.3)
    shares = shares_of(layout, 2)
    assert min(len(share.row.token_ids) for share in shares) > 2 * FLEX_TILE
    actual = attention_over_shares(flex_attention_over_row, shares, layout, *inputs, scale=0.3)
    assert torch.allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(
    "layout",
    [
        block_diffusion_layout([8192], 60, 4),
        block_diffusion_layout([4096], 900, 4),
        block_diffusion_layout([512, 3000, 40, 1500, 700], 8, 4),
        clean_layout([8191], "causal", 1),
        clean_layout([1024, 700, 2100], "full", 1),
    ],
    ids=["long response", "late blocks", "packed", "teacher", "full attention"],
)
def test_tokens_and_pairs_are_balanced(layout: torch.Tensor, ranks: int) -> None:
    """At sizes of real rows: the fullest rank is near the mean, and holds 1/R of the row."""
    shares = shares_of(layout, ranks)
    tokens = [len(share.row.token_ids) for share in shares]
    pairs = [share.pairs for share in shares]
    assert max(tokens) <= 1.05 * layout.shape[1] / ranks
    assert max(pairs) <= 1.05 * sum(pairs) / ranks
