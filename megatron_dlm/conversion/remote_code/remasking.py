"""Which drawn tokens a denoising step keeps, for plain transformers.

r: rows; B: positions of a block, or of a whole response.
"""

import torch
from torch import Tensor

REMASKING_STRATEGIES = (
    "low_confidence_static",
    "low_confidence_dynamic",
    "entropy",
    "entropy_bounded",
)


def committed_positions(
    strategy: str,
    masked: Tensor,
    confidence: Tensor,
    entropy: Tensor,
    *,
    step: Tensor,
    masked_at_start: Tensor,
    num_steps: int,
    dynamic_threshold: float,
    entropy_bound: float,
) -> Tensor:
    """Where drawn tokens are kept, [r, B] bool; the lowest position first among equals.

    Args:
        strategy: One of `REMASKING_STRATEGIES`.
        masked: [r, B] bool, positions that are MASK; only they are kept, at least one a row.
        confidence: [r, B], probability of each drawn token.
        entropy: [r, B], entropy of each distribution in nats.
        step: [r], denoising step of the block, from 1.
        masked_at_start: [r], positions that were MASK at the first step.
        num_steps: Steps of a block in which everything is MASK.
        dynamic_threshold: Confidence that `low_confidence_dynamic` asks for.
        entropy_bound: Excess entropy in nats that `entropy_bounded` accepts.
    """
    score = -entropy if strategy == "entropy" else confidence
    order = (
        score.masked_fill(~masked, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    )
    if strategy == "low_confidence_static":
        tokens, left_over = divmod(masked.shape[-1], num_steps)
        count = tokens + (step <= left_over).long()
    elif strategy == "low_confidence_dynamic":
        count = (masked & (confidence > dynamic_threshold)).sum(-1)
    elif strategy == "entropy":
        stay = masked_at_start * (num_steps - step).clamp(min=0) // num_steps
        count = masked.sum(-1) - stay
    else:
        ordered = entropy.masked_fill(~masked, torch.inf).gather(-1, order)
        excess = ordered.cumsum(-1) - ordered.cummax(-1).values
        count = (excess <= entropy_bound).long().cumprod(-1).sum(-1)
    first = torch.arange(masked.shape[-1], device=masked.device) < count.clamp(min=1)[:, None]
    return first.scatter(-1, order, first) & masked
