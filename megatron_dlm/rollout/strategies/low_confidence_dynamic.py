"""low_confidence_dynamic: every token that is certain enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dlm.ranges import PROBABILITY
from megatron_dlm.rollout.strategies.base import Strategy, StrategyOption, register
from megatron_dlm.rollout.strategies.blocks import DenoisedBlocks, first_of, in_order

if TYPE_CHECKING:
    from torch import Tensor


DEFAULT_THRESHOLD = 0.9


def low_confidence_dynamic(blocks: DenoisedBlocks, threshold: float) -> Tensor:
    """Every masked position above the threshold; if there is none, the most confident one."""
    passing = blocks.masked & (blocks.confidence > threshold)
    order = in_order(blocks.confidence, blocks.masked)
    return first_of(order, passing.sum(dim=-1), blocks.masked)


register(
    Strategy(
        name="low_confidence_dynamic",
        short_name="dynamic",
        commit=low_confidence_dynamic,
        option=StrategyOption(
            name="dynamic_threshold",
            type=float,
            default=DEFAULT_THRESHOLD,
            range=PROBABILITY,
            unit="threshold",
            help="Confidence a token must exceed to be kept by low_confidence_dynamic.",
        ),
        help="all above --dynamic-threshold",
    )
)
