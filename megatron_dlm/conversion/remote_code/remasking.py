"""Which drawn tokens a denoising step keeps, for plain transformers.

n: positions that are still MASK.
"""

from torch import Tensor

REMASKING_STRATEGIES = (
    "low_confidence_static",
    "low_confidence_dynamic",
    "entropy",
    "entropy_bounded",
)


def committed_positions(
    strategy: str,
    confidence: Tensor,
    entropy: Tensor,
    *,
    step: int,
    num_steps: int,
    block_size: int,
    masked_at_start: int,
    dynamic_threshold: float,
    entropy_bound: float,
) -> Tensor:
    """Indices of the positions whose tokens are kept; the lowest one first among equals.

    Args:
        strategy: One of `REMASKING_STRATEGIES`.
        confidence: [n], probability of each drawn token.
        entropy: [n], entropy of each distribution in nats.
        step: Denoising step of the block, from 1.
        num_steps: Steps of a block in which everything is MASK.
        block_size: Positions of such a block.
        masked_at_start: Positions that were MASK at the first step of this one.
        dynamic_threshold: Confidence that `low_confidence_dynamic` asks for.
        entropy_bound: Excess entropy in nats that `entropy_bounded` accepts.
    """
    by_confidence = confidence.sort(descending=True, stable=True).indices
    if strategy == "low_confidence_static":
        tokens, left_over = divmod(block_size, num_steps)
        return by_confidence[: tokens + (step <= left_over)]
    if strategy == "low_confidence_dynamic":
        return by_confidence[: max(1, int((confidence > dynamic_threshold).sum()))]
    if strategy == "entropy":
        stay = masked_at_start * max(num_steps - step, 0) // num_steps
        by_entropy = entropy.sort(stable=True).indices
        return by_entropy[: max(1, len(entropy) - stay)]
    ordered = entropy[by_confidence]
    excess = ordered.cumsum(0) - ordered.cummax(0).values
    within = (excess <= entropy_bound).long().cumprod(0)
    return by_confidence[: max(1, int(within.sum()))]
