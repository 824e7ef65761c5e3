"""Which of the drawn tokens are committed at a denoising step; the others stay MASK.

Every strategy commits masked positions only, at least one of them wherever there is one (decoding
always ends), and resolves equal scores in favour of the lowest position.

r: blocks decoded at once; B: positions of a block (its size, or the whole response).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dlm.rollout.generation_config import GenerationConfig


@dataclass(frozen=True)
class DenoisedBlocks:
    """Blocks after a draw at each of their masked positions.

    Attributes:
        masked: [r, B] bool, positions that were MASK in the forward.
        confidence: [r, B] float32 of the drawn tokens; ignored where not masked.
        entropy: [r, B] float32 of the distributions, ignored likewise.
        step: [r] int64, denoising step of the block, counted from 1.
        masked_at_start: [r] int64, masked positions of the block before its first step.
    """

    masked: Tensor
    confidence: Tensor
    entropy: Tensor
    step: Tensor
    masked_at_start: Tensor


def _order(scores: Tensor, masked: Tensor) -> Tensor:
    """Positions by descending score, lowest position first among equals, unmasked ones last."""
    scores = scores.masked_fill(~masked, -torch.inf)
    # A stable sort keeps equals in order, but an unmasked position must not precede a masked one
    # whose own score is -inf.
    by_score = scores.sort(dim=-1, descending=True, stable=True).indices
    unmasked = ~masked.gather(-1, by_score)
    return by_score.gather(-1, unmasked.long().sort(dim=-1, stable=True).indices)


def _first(order: Tensor, count: Tensor, masked: Tensor) -> Tensor:
    """The first `count` [r] positions of `order` [r, B], as a mask [r, B]."""
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (rank < count[:, None]) & masked


def _num_steps(blocks: DenoisedBlocks, config: GenerationConfig) -> int:
    """Denoising steps of a block in which everything is MASK; by default one for each token."""
    return config.denoising_steps_per_block or blocks.masked.shape[-1]


def low_confidence_static(blocks: DenoisedBlocks, config: GenerationConfig) -> Tensor:
    """The B / K most confident masked positions, K = `denoising_steps_per_block`.

    Where K does not divide B, which only a whole response may do, the first steps commit one more.
    """
    tokens, left_over = divmod(blocks.masked.shape[-1], _num_steps(blocks, config))
    count = tokens + (blocks.step <= left_over).long()
    return _first(_order(blocks.confidence, blocks.masked), count, blocks.masked)


def low_confidence_dynamic(blocks: DenoisedBlocks, config: GenerationConfig) -> Tensor:
    """Every masked position above `dynamic_threshold`; if there is none, the most confident one."""
    passing = blocks.masked & (blocks.confidence > config.dynamic_threshold)
    best = _first(
        _order(blocks.confidence, blocks.masked), torch.ones_like(blocks.step), blocks.masked
    )
    return torch.where(passing.any(dim=-1, keepdim=True), passing, best)


def entropy(blocks: DenoisedBlocks, config: GenerationConfig) -> Tensor:
    """Keep the floor(N k / K) masked positions of highest entropy (RND1).

    N positions were masked at the start of the block, K is `denoising_steps_per_block` (B by
    default), and k = K - step steps remain.
    """
    steps = _num_steps(blocks, config)
    remaining = (steps - blocks.step).clamp_(min=0)
    keep = blocks.masked_at_start * remaining // steps
    count = (blocks.masked.sum(dim=-1) - keep).clamp_(min=1)
    return _first(_order(-blocks.entropy, blocks.masked), count, blocks.masked)


def entropy_bounded(blocks: DenoisedBlocks, config: GenerationConfig) -> Tensor:
    """In order of confidence while cumsum(entropy) - cummax(entropy) <= `entropy_bound`."""
    order = _order(blocks.confidence, blocks.masked)
    sorted_entropy = blocks.entropy.gather(-1, order)
    excess = sorted_entropy.cumsum(dim=-1) - sorted_entropy.cummax(dim=-1).values
    within = (excess <= config.entropy_bound).long().cumprod(dim=-1)
    # The first one has no excess over itself; rounding must not be able to deny it.
    return _first(order, within.sum(dim=-1).clamp_(min=1), blocks.masked)


REMASKING_STRATEGIES: dict[str, Callable[[DenoisedBlocks, GenerationConfig], Tensor]] = {
    strategy.__name__: strategy
    for strategy in (low_confidence_static, low_confidence_dynamic, entropy, entropy_bounded)
}


def commit_positions(blocks: DenoisedBlocks, config: GenerationConfig) -> Tensor:
    """Positions committed at this step under `config.remasking_strategy`, [r, B] bool."""
    return REMASKING_STRATEGIES[config.remasking_strategy](blocks, config)
