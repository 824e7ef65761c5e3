"""The option that strategies with a fixed number of steps share."""

from megatron_dlm.ranges import Range
from megatron_dlm.rollout.strategies.base import StrategyOption

DENOISING_STEPS = StrategyOption(
    name="denoising_steps_per_block",
    type=int,
    default=None,
    # More than any block has tokens, and far from what an int64 holds.
    range=Range(1, 2**20),
    unit="steps",
    help="Denoising steps of low_confidence_static (a divisor of --block-size) and entropy for a "
    "block, or for a response that is decoded as a whole (default: one token a step).",
    argument="denoising_steps",
)
