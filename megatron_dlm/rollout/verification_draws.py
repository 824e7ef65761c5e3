"""Speculative sampling on logits: the probability of a draft, and the draw where one is refused.

A draft x of distribution q is accepted with probability min(1, p(x) / q(x)); where it is not, the
token is drawn from max(p - q, 0), normalised. It is then distributed as p (Leviathan et al. 2023,
Chen et al. 2023). Modelling code of exported folders contains this module.

n: tokens; v: this rank's columns of the vocabulary, a multiple of the block; tp: ranks that hold
shards of the vocabulary.
"""

import torch
from torch import Tensor

from megatron_dlm.rollout.block_draws import VOCABULARY_BLOCK, first_above, top_k_threshold
from megatron_dlm.rollout.top_p_search import Gather, top_p_threshold


def probabilities(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, gather: Gather
) -> Tensor:
    """This rank's columns of the distribution that `block_draws.draw_from_logits` draws from.

    Args:
        logits: [n, v] of any floating type; what must not be drawn has the lowest value of it.
        temperature: Above 0.
        top_k: 0 is off.
        top_p: 1 is off.
        gather: See `block_draws`.

    Returns:
        [n, v] float64; over the columns of all ranks a row sums to 1.
    """
    maximum = logits.unflatten(1, (-1, VOCABULARY_BLOCK)).amax(dim=-1).float()
    top = gather(maximum.amax(dim=-1)).amax(dim=0)
    threshold = None
    if top_k:
        threshold = top_k_threshold(logits, maximum, top_k, gather)
    if top_p < 1.0:
        threshold = top_p_threshold(logits, top, temperature, top_p, threshold, gather)
    weights = ((logits.double() - top.double()[:, None]) / temperature).exp_()
    if threshold is not None:
        weights.masked_fill_(logits < threshold[:, None], 0.0)
    return weights.div_(gather(weights.sum(dim=-1)).sum(dim=0)[:, None])


def probability_of(p: Tensor, tokens: Tensor, first_id: int, gather: Gather) -> Tensor:
    """Probabilities [n] float64 of tokens [n] under distributions p, [n, v] of each rank.

    Args:
        p: See `probabilities`.
        tokens: [n] int64.
        first_id: Vocabulary id of this rank's first column.
        gather: See `block_draws`.
    """
    column = tokens - first_id
    is_here = (column >= 0) & (column < p.shape[1])
    own = p.gather(1, column.clamp(0, p.shape[1] - 1)[:, None])[:, 0]
    return gather(own.masked_fill(~is_here, 0.0)).sum(dim=0)


def draw_residual(p: Tensor, q: Tensor, uniforms: Tensor, first_id: int, gather: Gather) -> Tensor:
    """Draw from max(p - q, 0), normalised; from p where rounding leaves nothing of that.

    Args:
        p: [n, v] of each rank, as q.
        q: Zero in the rows of tokens that nobody drafted.
        uniforms: [n] float64 in [0, 1).
        first_id: Vocabulary id of this rank's first column.
        gather: See `block_draws`.

    Returns:
        Token ids [n] int64, the same on every rank.
    """
    residual = (p - q).clamp_(min=0.0)
    masses = gather(residual.sum(dim=-1))  # [tp, n]
    is_left = masses.sum(dim=0) > 0.0
    residual = torch.where(is_left[:, None], residual, p)
    masses = torch.where(is_left, masses, gather(p.sum(dim=-1)))
    owner, fraction = first_above(masses.T, uniforms)
    column, _ = first_above(residual, fraction)
    return gather(first_id + column).gather(0, owner[None])[0]
