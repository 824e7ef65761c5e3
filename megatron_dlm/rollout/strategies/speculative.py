"""speculative: drafts by diffusion, verified by the autoregressive mode of the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dlm.ranges import Range
from megatron_dlm.rollout.strategies.base import Strategy, StrategyOption, register
from megatron_dlm.rollout.strategies.blocks import DenoisedBlocks

if TYPE_CHECKING:
    from torch import Tensor


def from_the_left(blocks: DenoisedBlocks, num_steps: int) -> Tensor:
    """The first ceil(N / K) masked positions of N at the block's start, K = `num_steps`.

    In the order of the text, so that a draft was drawn given earlier tokens only: its distribution
    is then known, which exact verification needs.
    """
    count = (blocks.masked_at_start + num_steps - 1) // num_steps
    return blocks.masked & (blocks.masked.cumsum(dim=-1) <= count.clamp(min=1)[:, None])


register(
    Strategy(
        name="speculative",
        short_name="speculative",
        commit=from_the_left,
        option=StrategyOption(
            name="draft_steps",
            type=int,
            default=1,
            range=Range(1, 2**20),
            unit="steps",
            help="Denoising steps in which speculative drafts what is left of a block, from left "
            "to right; another forward verifies it.",
        ),
        help="those of --draft-steps steps that the autoregressive mode accepts, of models with a "
        "causal context",
        verifies=True,
    )
)
