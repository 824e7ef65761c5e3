"""entropy_bounded: as many tokens as keep a bound on their mutual dependence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dlm.ranges import AT_LEAST_ZERO
from megatron_dlm.rollout.strategies.base import Strategy, StrategyOption, register
from megatron_dlm.rollout.strategies.blocks import DenoisedBlocks, first_of, in_order

if TYPE_CHECKING:
    from torch import Tensor


def entropy_bounded(blocks: DenoisedBlocks, bound: float) -> Tensor:
    """Keep tokens by confidence while cumsum(entropy) - cummax(entropy) is within the bound."""
    order = in_order(blocks.confidence, blocks.masked)
    entropy = blocks.entropy.gather(-1, order)
    excess = entropy.cumsum(dim=-1) - entropy.cummax(dim=-1).values
    within = (excess <= bound).long().cumprod(dim=-1)
    # The first one is always kept: its excess is 0, whatever rounding says.
    return first_of(order, within.sum(dim=-1), blocks.masked)


register(
    Strategy(
        name="entropy_bounded",
        short_name="entropy_bounded",
        commit=entropy_bounded,
        option=StrategyOption(
            name="entropy_bound",
            type=float,
            default=0.1,
            range=AT_LEAST_ZERO,
            unit="nats",
            help="Excess entropy in nats that entropy_bounded accepts at a step.",
        ),
        help="the most certain within --entropy-bound",
    )
)
