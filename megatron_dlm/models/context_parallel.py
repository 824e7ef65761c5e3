"""Context parallelism: the tokens of a row are shared by ranks that run the same rows.

A noisy block sees earlier clean blocks and itself. So each noisy block is given to one rank, with
its queries, keys, values and gradients, and none of it travels. Clean tokens are spread over the
same ranks; of these, every rank gathers keys and values in each layer, and their gradients are
added up where they came from. One stream (a teacher's, or full attention) is the case without noisy
blocks. Megatron-Core's own context parallelism knows no such visibility and is not used.

Source: context-sharded block parallelism (arXiv:2609.19242).

S: tokens of the row; R: ranks; C: clean tokens of each rank's share, padding included; N: tokens of
a share.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dlm.models.attention import CachedAttention
from megatron_dlm.models.attention_layout import (
    CLEAN,
    PADDING_DOCUMENT,
    Field,
    pad_layout,
    visible_counts,
)
from megatron_dlm.models.forward import Row, pad_row

PIECES = 8
"""Pieces that each rank has at least, of clean and of noisy tokens: more are better balanced."""

LONGEST_PIECE = 128
"""Tokens of a piece where there are more: a tile of FlexAttention, which skips whole ones."""


def token_ranks(layout: Tensor | CachedAttention, ranks: int) -> Tensor:
    """The rank that holds each token of a row, [S] int64; -1 for padding.

    Clean tokens, and noisy ones between their blocks, are cut into equal pieces. Those that see the
    most come first: each round gives a piece to every rank, the dearest to the rank whose tokens
    see the least so far. All ranks then have as many tokens, and about as many pairs of a query and
    a key that it sees.

    Args:
        layout: [4, S] to [6, S] int32 on the CPU; the draws of annealed attention do not count.
        ranks: R.
    """
    assert isinstance(layout, Tensor)
    holder = torch.full((layout.shape[1],), -1)
    pairs = visible_counts(layout[:4])
    real = layout[Field.DOCUMENT] != PADDING_DOCUMENT
    is_clean = layout[Field.STREAM] == CLEAN
    seen = torch.zeros(ranks, dtype=torch.int64)
    for tokens in (real & is_clean, real & ~is_clean):
        chosen = tokens.nonzero()[:, 0]
        if not len(chosen):
            continue
        rounds = max(PIECES, -(-len(chosen) // (ranks * LONGEST_PIECE)))
        piece = _pieces(layout[:, chosen], ranks * rounds)
        costs = torch.zeros(ranks * rounds, dtype=torch.int64)
        costs.index_add_(0, piece, pairs[chosen])
        of_piece = torch.empty_like(costs)
        for dealt in costs.argsort(descending=True, stable=True).split(ranks):
            of_piece[dealt] = seen.argsort(stable=True)
            seen[of_piece[dealt]] += costs[dealt]
        holder[chosen] = of_piece[piece]
    return holder


def _pieces(layout: Tensor, pieces: int) -> Tensor:
    """Number of the piece of each token [S], ascending, of a row's clean or of its noisy tokens."""
    if int(layout[Field.STREAM, 0]) == CLEAN:  # a clean token can lie apart from its block
        unit = torch.arange(layout.shape[1])
    else:
        block = layout[[Field.DOCUMENT, Field.STREAM, Field.BLOCK]]
        starts = torch.zeros(layout.shape[1], dtype=torch.int64)
        starts[1:] = (block[:, 1:] != block[:, :-1]).any(0)
        unit = starts.cumsum(0)
    return unit * pieces // (unit[-1] + 1)


@dataclass(frozen=True)
class Share:
    """A rank's share of a row.

    Attributes:
        row: N tokens, with a layout of R C + N: the clean tokens of all ranks, rank by rank, then
            the share, which begins with the rank's own clean tokens.
        place: [S] int64, index in the share of each token of the whole row that is in it, else -1.
        pairs: Pairs of a query of the share and a key that it sees.
    """

    row: Row
    place: Tensor
    pairs: int


def share_of_row(row: Row, holder: Tensor, rank: int, ranks: int, multiple: int) -> Share:
    """Take a rank's share out of a row with a layout.

    Args:
        row: S tokens.
        holder: [S], `token_ranks`.
        rank: Index of the rank.
        ranks: R.
        multiple: The share is padded to a multiple of this.
    """
    layout = row.attention
    assert isinstance(layout, Tensor)
    is_clean = layout[Field.STREAM] == CLEAN
    clean = [(is_clean & (holder == part)).nonzero()[:, 0] for part in range(ranks)]
    noisy = (~is_clean & (holder == rank)).nonzero()[:, 0]
    longest = max(len(tokens) for tokens in clean)
    of_ranks = [pad_layout(layout[:, tokens], longest) for tokens in clean]
    own = clean[rank]
    place = torch.full_like(holder, -1)
    place[own] = torch.arange(len(own))
    place[noisy] = longest + torch.arange(len(noisy))
    padding = row.token_ids.new_zeros(longest - len(own))
    share = torch.cat((of_ranks[rank], layout[:, noisy]), dim=1)
    whole = Row(
        token_ids=torch.cat((row.token_ids[own], padding, row.token_ids[noisy])),
        position_ids=share[Field.POSITION].long(),
        attention=torch.cat((*of_ranks, share), dim=1),
    )
    return Share(
        row=pad_row(whole, multiple),
        place=place,
        pairs=int(visible_counts(layout)[holder == rank].sum()),
    )
