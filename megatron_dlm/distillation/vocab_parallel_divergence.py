"""Divergence between teacher and student on vocabulary-parallel output layers, fused and chunked.

Both models hand over hidden states; the two [chunk, vocabulary / tp] logit buffers of a chunk are
all that ever exists of their distributions (see `vocab_parallel_head` for the chunk loop).

Every divergence here is a sum over entries of a function of (log p, log q). An entry is a
vocabulary id or, with `top_k`, one of the teacher's k most likely ids or the bucket of all others.
With slope_j = d D / d log q_j and q = softmax(z), the gradient is d D / d z_j = slope_j - q_j * sum
slope; the bucket's share goes to its ids in proportion to their probabilities.

Shapes: n tokens, c tokens of a chunk, h and h_t hidden sizes, v valid local vocabulary entries.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm.distillation.vocab_parallel_head import (
    VocabShard,
    head_loss,
    project,
    tile_rows,
    tiled_logsumexp,
)
from megatron_dlm.distillation.vocab_parallel_top_k import top_k_of_logits
from megatron_dlm.types.divergence_spec import DivergenceSpec
from megatron_dlm.types.teacher_targets import TopKTargets


def vocab_parallel_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    token_weights: Tensor,
    spec: DivergenceSpec,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute sum_i token_weights_i * D(p_i, q_i) and its gradient in one pass over the tokens.

    p_i and q_i are the teacher's and the student's distribution at token i: rows are paired as
    given, so the shift of an autoregressive teacher is the caller's. Arithmetic is in fp32.

    Args:
        student_hidden: [n, h]; every rank of the group passes the same tokens. When tp > 1 its
            gradient is this rank's partial sum: wrap it in `copy_to_tensor_model_parallel_region`
            or `gather_from_sequence_parallel_region` (see `vocab_parallel_head.head_loss`).
        student_head: [padded_vocabulary / tp, h], this rank's rows, contiguous shards in rank
            order. Its gradient is complete.
        teacher_hidden: [n, h_t], without gradient.
        teacher_head: [padded_vocabulary / tp, h_t], without gradient; the same vocabulary rows as
            the student's.
        token_weights: [n].
        spec: The divergence.
        vocab_size: Rows with an id from here on are padding: no probability, zero gradient.
        tp_group: Tensor-parallel group, None for one rank.

    Returns:
        (loss_sum scalar with gradient, per_token [n] detached, unweighted, fp32).

    Raises:
        ValueError: Shapes disagree, the heads hold fewer rows than the vocabulary, or teacher and
            student shards begin at different ids.
    """
    if teacher_hidden.shape[0] != student_hidden.shape[0]:
        raise ValueError(
            f"{teacher_hidden.shape[0]} teacher rows for {student_hidden.shape[0]} student rows"
        )
    shard = VocabShard.of(student_head, vocab_size, tp_group)
    if VocabShard.of(teacher_head, vocab_size, tp_group) != shard:
        raise ValueError(
            f"a teacher head of {teacher_head.shape[0]} rows a rank and a student head of "
            f"{student_head.shape[0]} split the vocabulary of {vocab_size} at different ids"
        )
    teacher_hidden, teacher_head = teacher_hidden.detach(), teacher_head.detach()
    # With k >= the vocabulary there is no rest.
    compares_all = not 0 < spec.top_k < vocab_size

    def chunk_loss(rows: slice, needs_grad: bool, student: Tensor) -> Tensor:
        teacher = project(teacher_hidden[rows], teacher_head[: shard.size])
        if compares_all:
            return _full_divergence(teacher, student, spec, shard, needs_grad)
        ids, log_p, _ = top_k_of_logits(teacher, spec.top_k, shard)
        return _top_k_divergence(ids, log_p, student, spec, shard, needs_grad)

    return head_loss(
        student_hidden, student_head, token_weights, shard, chunk_loss, spec.chunk_size
    )


def vocab_parallel_top_k_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    targets: TopKTargets,
    token_weights: Tensor,
    spec: DivergenceSpec,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `vocab_parallel_divergence` with `spec.top_k` from stored targets.

    Args:
        student_hidden: [n, h], as in `vocab_parallel_divergence`.
        student_head: [padded_vocabulary / tp, h], likewise.
        targets: The teacher's n distributions, with `log_rest`, on the student's device; every rank
            of the group passes the same.
        token_weights: [n].
        spec: The divergence; its top_k is that of the targets.
        vocab_size: Rows with an id from here on are padding: no probability, zero gradient.
        tp_group: Tensor-parallel group, None for one rank.

    Returns:
        (loss_sum scalar with gradient, per_token [n] detached, unweighted, fp32).

    Raises:
        ValueError: The targets are of another number of tokens or another k, or lack `log_rest`.
    """
    if targets.token_ids.shape != (student_hidden.shape[0], spec.top_k):
        raise ValueError(
            f"targets of shape {tuple(targets.token_ids.shape)} for {student_hidden.shape[0]} "
            f"student rows and top_k {spec.top_k}"
        )
    if targets.log_rest is None:
        raise ValueError("the targets lack `log_rest`, the log-probability of all other tokens")
    shard = VocabShard.of(student_head, vocab_size, tp_group)
    ids = targets.token_ids.long()
    log_p = torch.cat([targets.log_probs, targets.log_rest.unsqueeze(1)], dim=1)

    def chunk_loss(rows: slice, needs_grad: bool, student: Tensor) -> Tensor:
        chunk_log_p = log_p[rows].to(student.dtype)
        return _top_k_divergence(ids[rows], chunk_log_p, student, spec, shard, needs_grad)

    return head_loss(
        student_hidden, student_head, token_weights, shard, chunk_loss, spec.chunk_size
    )


def _full_divergence(
    teacher: Tensor, student: Tensor, spec: DivergenceSpec, shard: VocabShard, needs_grad: bool
) -> Tensor:
    """Divergence [c] over all ids of logits [c, v]; the student's become their gradient."""
    log_p, log_q = teacher, student
    _log_softmax_([log_p, log_q], shard)

    # Rows [value, sum of slopes] of the local ids, the slopes themselves in the teacher's buffer.
    sums = log_q.new_zeros(2, log_q.shape[0])
    rows = tile_rows(log_q)
    for tile_p, tile_q, tile_sums in zip(
        log_p.split(rows), log_q.split(rows), sums.split(rows, dim=1), strict=True
    ):
        terms, slopes = _terms(tile_p, tile_q, spec)
        tile_p.copy_(slopes)
        tile_sums[0] = terms.sum(-1)
        tile_sums[1] = slopes.sum(-1)
    value, slope_sum = shard.sum(sums).unbind(0)
    if needs_grad:
        log_q.exp_().mul_(-slope_sum.unsqueeze(1)).add_(log_p)
    return value


def _log_softmax_(chunks: list[Tensor], shard: VocabShard) -> None:
    """Turn logits [c, v] into log-probabilities over all ranks, in place, in one exchange.

    Everything stays relative to a maximum: a log-sum-exp of the size of the logits would round
    away digits of the normalisation, which reverse KL multiplies by its largest gap.
    """
    if shard.size > 0:
        peak = torch.stack([logits.amax(-1) for logits in chunks])  # [chunks, c]
    else:
        peak = chunks[0].new_full((len(chunks), chunks[0].shape[0]), -torch.inf)
    for logits, offset in zip(chunks, peak, strict=True):
        logits.sub_(offset.unsqueeze(1))
    mass = torch.stack([tiled_logsumexp(logits) for logits in chunks])
    peaks, masses = shard.all_gather(torch.stack([peak, mass])).unbind(1)  # [tp, chunks, c] each
    highest = peaks.amax(0)
    normalizer = (highest - peak) + (peaks - highest + masses).logsumexp(0)
    for logits, offset in zip(chunks, normalizer, strict=True):
        logits.sub_(offset.unsqueeze(1))


def _top_k_divergence(
    ids: Tensor,
    log_p: Tensor,
    student: Tensor,
    spec: DivergenceSpec,
    shard: VocabShard,
    needs_grad: bool,
) -> Tensor:
    """Divergence [c] over the teacher's k best ids and, unless ignored, the bucket of the rest.

    Args:
        ids: [c, k] of the teacher.
        log_p: [c, k + 1], the log-probabilities of these ids and, last, of the bucket.
        student: Logits [c, v]; they become their gradient.
        spec: The divergence.
        shard: Which ids the logits are of.
        needs_grad: Whether the gradient is wanted.
    """
    column, here = shard.locate(ids)
    student_top = shard.pick(student, column, here)
    shard.add(student, column, here, torch.full_like(student_top, -torch.inf))
    # With its own maximum, the bucket's mass never underflows, however little it is.
    rest = tiled_logsumexp(student).unsqueeze(1)
    logits = shard.logsumexp(torch.cat([student_top, rest], dim=1))
    log_q = logits.log_softmax(1)  # [c, k + 1]

    terms, slopes = _terms(log_p, log_q, spec)
    if spec.tail == "ignore":
        terms[:, -1] = 0
        slopes[:, -1] = 0
    if needs_grad:
        gradient = slopes.addcmul_(log_q.exp(), slopes.sum(1, keepdim=True), value=-1)
        student.sub_(logits[:, -1:]).exp_().mul_(gradient[:, -1:])
        shard.add(student, column, here, gradient[:, :-1])
    return terms.sum(1)


def _terms(log_p: Tensor, log_q: Tensor, spec: DivergenceSpec) -> tuple[Tensor, Tensor]:
    """Each entry's share of D(p, q), and its derivative by the entry's log q.

    Only exp of log-probabilities is taken and no log of a probability, so an entry whose
    probability underflows contributes zero rather than NaN.
    """
    terms, slopes = torch.zeros_like(log_q), torch.zeros_like(log_q)
    for name, weight in spec.weights.items():
        if name == "forward_kl":
            p = log_p.exp()
            terms.addcmul_(p, log_p - log_q, value=weight)
            slopes.sub_(p, alpha=weight)
        elif name == "reverse_kl":
            q, gap = log_q.exp(), log_q - log_p
            terms.addcmul_(q, gap, value=weight)
            slopes.addcmul_(q, gap + 1, value=weight)
        else:
            beta = spec.jsd_beta
            p, q = log_p.exp(), log_q.exp()
            log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
            terms.addcmul_(p, log_p - log_m, value=weight * beta)
            # The two parts' derivatives by log m cancel, so the term of q is its own slope.
            slope = q.mul_(log_q - log_m).mul_(weight * (1 - beta))
            terms.add_(slope)
            slopes.add_(slope)
    return terms, slopes
