"""Input of a decoding strategy, and helpers to order positions by a score.

r: blocks decoded at once; B: positions of a block (its size, or the whole response).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_LEAST = -3e38
"""Below every finite score, and a float32."""


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
    # A masked position whose own score is -inf must not come after an unmasked one.
    scores = scores.clamp(min=_LEAST).masked_fill(~masked, -float("inf"))
    return scores.sort(dim=-1, descending=True, stable=True).indices


def first_of(order: Tensor, count: Tensor | int, masked: Tensor) -> Tensor:
    """The first `count` positions of `order` [r, B], at least one, as a mask [r, B].

    Args:
        order: See `in_order`.
        count: Of each block, [r], or of all of them.
        masked: [r, B] bool; others are not taken.
    """
    rank = order.argsort(dim=-1)
    most = max(count, 1) if isinstance(count, int) else count.clamp(min=1)[:, None]
    return (rank < most) & masked
