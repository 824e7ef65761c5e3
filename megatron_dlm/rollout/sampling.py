"""Drawing tokens from vocabulary-parallel logits with counter-based randomness.

A draw is Gumbel-max: argmax over the vocabulary of logit / temperature + Gumbel noise. The noise
(`gumbel_noise`) depends neither on the batch nor on the parallel layout, and every tensor-parallel
rank computes its own shard's only. Ranks exchange a few numbers per drawn token, never the
vocabulary.

n: tokens drawn at once; Vp: vocabulary padded for tensor parallelism; tp: its ranks; k: top-k.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dlm.rollout.gumbel_noise import gumbel_noise

# Logit of a token that must not be drawn. Finite, so that 0 * FORBIDDEN is 0 in the entropy.
_FORBIDDEN = -1e30


@dataclass(frozen=True)
class SampledTokens:
    """Drawn tokens, and their confidence and entropy for remasking.

    Attributes:
        token_ids: [n] int64.
        confidence: [n] float32, probability of the drawn token under the untempered, unfiltered
            softmax over the vocabulary without MASK and padding ids.
        entropy: [n] float32, entropy of that softmax in nats.
    """

    token_ids: Tensor
    confidence: Tensor
    entropy: Tensor


def _reduce(values: Tensor, op: dist.ReduceOp.RedOpType, tp_group: ProcessGroup | None) -> Tensor:
    if tp_group is not None and tp_group.size() > 1:
        dist.all_reduce(values, op=op, group=tp_group)
    return values


def _gather(values: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    """[...] of every rank as [tp, ...], in the order of ranks."""
    if tp_group is None or tp_group.size() == 1:
        return values[None]
    # Concatenation along dimension 0 is the one form that every backend offers.
    gathered = values.new_empty(tp_group.size() * values.shape[0], *values.shape[1:])
    dist.all_gather_into_tensor(gathered, values.contiguous(), group=tp_group)
    return gathered.view(tp_group.size(), *values.shape)


def _apply_top_k(scaled: Tensor, top_k: int, tp_group: ProcessGroup | None) -> Tensor:
    """Forbid values below the k-th largest; ties with it stay."""
    largest = scaled.topk(min(top_k, scaled.shape[1]), dim=-1).values
    candidates = _gather(largest, tp_group).transpose(0, 1).flatten(1)
    threshold = candidates.topk(min(top_k, candidates.shape[1]), dim=-1).values[:, -1:]
    return scaled.masked_fill(scaled < threshold, _FORBIDDEN)


def _apply_top_p(scaled: Tensor, top_p: float, tp_group: ProcessGroup | None) -> Tensor:
    """Forbid all but the smallest set of most likely tokens with mass >= p; ties stay together.

    The set is {distance from the top <= t} for the smallest t that holds enough mass. Non-negative
    float32 values order like their bit patterns, so a bisection over these ends at exactly that t.
    """
    top = _reduce(scaled.amax(dim=-1), dist.ReduceOp.MAX, tp_group)
    distance = top[:, None] - scaled
    weight = (-distance).exp()
    needed = top_p * _reduce(weight.sum(-1, dtype=torch.float64), dist.ReduceOp.SUM, tp_group)
    # Adding zero turns -0.0, whose bits are those of a negative integer, into 0.0.
    bits = distance.add_(0.0).view(torch.int32)
    low = torch.zeros_like(top, dtype=torch.int32)
    high = torch.full_like(low, torch.tensor(-_FORBIDDEN).view(torch.int32).item())
    for _ in range(31):
        middle = low + (high - low) // 2
        inside = weight.masked_fill(bits > middle[:, None], 0.0).sum(-1, dtype=torch.float64)
        enough = _reduce(inside, dist.ReduceOp.SUM, tp_group) >= needed
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, torch.minimum(middle + 1, high))
    return scaled.masked_fill(bits > high[:, None], _FORBIDDEN)


def sample_tokens(
    logits: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    mask_token_id: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    sample_index: Tensor,
    position: Tensor,
    denoising_step: Tensor,
    tp_group: ProcessGroup | None = None,
) -> SampledTokens:
    """Draw one token for each row of vocabulary-parallel logits.

    The distribution is softmax(logits / temperature) restricted to the `top_k` most likely tokens
    and then to the smallest set of them with mass >= `top_p` (of what top-k left). MASK and padding
    ids have probability zero. Arithmetic is float32; equal scores go to the lowest id.

    Args:
        logits: [n, Vp/tp], this rank's shard, any floating type; n may be 0. Not modified.
        vocab_start: Vocabulary id of the shard's first column.
        vocab_size: Ids from here on are padding.
        mask_token_id: Never drawn.
        temperature: 0 takes the most likely token.
        top_k: 0 is off.
        top_p: 1 is off.
        seed: Seed of the run's draws.
        sample_index: [n] int64, global index of the sample.
        position: [n] int64, position of the token in its sequence.
        denoising_step: [n] int64.
        tp_group: Ranks that hold the other shards, ordered by `vocab_start`; None if there are
            none.

    Returns:
        The same on every rank of `tp_group`.
    """
    ids = torch.arange(vocab_start, vocab_start + logits.shape[1], device=logits.device)
    if logits.shape[0] == 0:
        none = logits.new_empty(0, dtype=torch.float32)
        return SampledTokens(torch.empty_like(ids[:0]), none, none)
    logits = logits.float().masked_fill((ids >= vocab_size) | (ids == mask_token_id), _FORBIDDEN)

    if temperature == 0.0:
        scores = logits
    else:
        scores = logits / temperature
        if 0 < top_k < vocab_size:
            scores = _apply_top_k(scores, top_k, tp_group)
        if top_p < 1.0:
            scores = _apply_top_p(scores, top_p, tp_group)
        scores = scores + gumbel_noise(seed, sample_index, position, denoising_step, ids)

    # `max` returns the first of equal maxima, here and over the ranks below: the lowest id.
    best_score, best = scores.max(dim=-1)
    top = logits.amax(dim=-1)
    shifted = logits - top[:, None]
    weight = shifted.exp()
    local = torch.stack(
        (
            best_score.double(),
            best.double() + vocab_start,
            logits.gather(1, best[:, None])[:, 0].double(),
            top.double(),
            weight.sum(dim=-1).double(),
            (weight * shifted).sum(dim=-1).double(),
        )
    )
    best_score, best_id, best_logit, top, mass, moment = _gather(local, tp_group).unbind(
        1
    )  # [tp, n]

    owner = best_score.max(dim=0).indices[None]
    token_ids = best_id.gather(0, owner)[0].long()
    token_logit = best_logit.gather(0, owner)[0]
    # Combine the shards' sums of exp(x - top) and exp(x - top) * (x - top) at the common maximum.
    shift = top - top.amax(dim=0)
    scale = shift.exp()
    total = (scale * mass).sum(dim=0)
    expectation = (scale * (moment + shift * mass)).sum(dim=0) / total
    log_total = total.log()
    return SampledTokens(
        token_ids=token_ids,
        confidence=(token_logit - top.amax(dim=0) - log_total).exp().float(),
        entropy=(log_total - expectation).clamp_(min=0.0).float(),
    )
