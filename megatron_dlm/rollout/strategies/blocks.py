"""Input of a decoding strategy, and helpers to order positions by a score.

r: blocks decoded at once; B: positions of a block (its size, or the whole response).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DenoisedBlocks:
    """Blocks after a draw at each of their masked positions.

    Attributes:
        masked: [r, B] bool, positions that were MASK in the forward.
        confidence: [r, B] float32 of the drawn tokens; ignored where not masked.
        entropy: [r, B] float32 of the distributions in nats, ignored likewise.
        step: [r] int64, denoising step of the block, counted from 1.
        masked_at_start: [r] int64, masked positions of the block before its first step.
    """

    masked: Tensor
    confidence: Tensor
    entropy: Tensor
    step: Tensor
    masked_at_start: Tensor


def in_order(scores: Tensor, masked: Tensor) -> Tensor:
    """Positions by descending score, lowest position first among equals, unmasked ones last."""
    scores = scores.masked_fill(~masked, -float("inf"))
    # A stable sort keeps equals in order, but an unmasked position must not precede a masked one
    # whose own score is -inf.
    by_score = scores.sort(dim=-1, descending=True, stable=True).indices
    unmasked = ~masked.gather(-1, by_score)
    return by_score.gather(-1, unmasked.long().sort(dim=-1, stable=True).indices)


def first_of(order: Tensor, count: Tensor, masked: Tensor) -> Tensor:
    """The first `count` [r] positions of `order` [r, B], at least one, as a mask [r, B]."""
    rank = order.argsort(dim=-1)
    return (rank < count.clamp(min=1)[:, None]) & masked
