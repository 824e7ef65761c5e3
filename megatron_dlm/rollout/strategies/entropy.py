"""entropy: a shrinking number of the tokens of highest entropy stays masked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dlm.rollout.strategies.base import Strategy, register
from megatron_dlm.rollout.strategies.blocks import DenoisedBlocks, first_of, in_order
from megatron_dlm.rollout.strategies.denoising_steps import DENOISING_STEPS

if TYPE_CHECKING:
    from torch import Tensor


def lowest_entropy(blocks: DenoisedBlocks, num_steps: int | None) -> Tensor:
    """Keep the floor(N k / K) masked positions of highest entropy (RND1).

    N positions were masked at the start of the block, K is `num_steps` (B by default), and
    k = K - step steps remain.
    """
    steps = num_steps or blocks.masked.shape[-1]
    remaining = (steps - blocks.step).clamp(min=0)
    keep = blocks.masked_at_start * remaining // steps
    order = in_order(-blocks.entropy, blocks.masked)
    return first_of(order, blocks.masked.sum(dim=-1) - keep, blocks.masked)


register(
    Strategy(
        name="entropy",
        short_name="entropy",
        commit=lowest_entropy,
        option=DENOISING_STEPS,
        help="all but a shrinking number of the highest entropy",
    )
)
