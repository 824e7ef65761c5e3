"""low_confidence_static: an equal share of the tokens at every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dlm.rollout.strategies.base import Strategy, register
from megatron_dlm.rollout.strategies.blocks import DenoisedBlocks, first_of, in_order
from megatron_dlm.rollout.strategies.denoising_steps import DENOISING_STEPS

if TYPE_CHECKING:
    from torch import Tensor


def low_confidence_static(blocks: DenoisedBlocks, num_steps: int | None) -> Tensor:
    """The B / K most confident masked positions, K = `num_steps` (B by default).

    Where K does not divide B, which only a whole response may do, the first steps commit one more.
    """
    size = blocks.masked.shape[-1]
    tokens, left_over = divmod(size, num_steps or size)
    count = tokens + (blocks.step <= left_over) if left_over else tokens
    return first_of(in_order(blocks.confidence, blocks.masked), count, blocks.masked)


register(
    Strategy(
        name="low_confidence_static",
        short_name="static",
        commit=low_confidence_static,
        option=DENOISING_STEPS,
        help="a fixed number of the most confident",
        divides_block=True,
    )
)
