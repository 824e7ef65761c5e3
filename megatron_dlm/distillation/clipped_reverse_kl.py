"""Reverse KL over a teacher's k most likely tokens, each term limited (d-OPSD, appendix C.1).

p and q are the teacher's and the student's probabilities renormalised over the k tokens; the loss
of a prediction is sum_v min(q_v log(q_v / p_v), limit). A few tokens carry most of a divergence;
the limit keeps them from dominating the update. A term above the limit is constant: it contributes
no gradient of its own.

Shapes: n predictions, c of a chunk, k tokens compared, h hidden size, v local vocabulary entries.
"""

import torch.distributed as dist
from torch import Tensor

from megatron_dlm.distillation.vocab_parallel_head import VocabShard, head_loss
from megatron_dlm.types.teacher_targets import TopKTargets


def clipped_reverse_kl(
    hidden: Tensor,
    head: Tensor,
    targets: TopKTargets,
    token_weights: Tensor,
    term_limit: float,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the weighted sum of the clipped divergences and its gradient.

    Args:
        hidden: [n, h]; every rank of the group passes the same. When tp > 1 its gradient is this
            rank's partial sum (see `vocab_parallel_head.head_loss`).
        head: [padded_vocabulary / tp, h], this rank's rows.
        targets: The teacher's n distributions on the same device; the same on every rank.
        token_weights: [n].
        term_limit: Largest term of one token.
        vocab_size: Rows with an id from here on are padding.
        tp_group: Tensor-parallel group, None for one rank.
        chunk_size: Predictions projected at a time; None for `tokens_of_chunk`.

    Returns:
        (loss_sum scalar with gradient, per_token [n] detached, unweighted, fp32).

    Raises:
        ValueError: There is not one target for each hidden state.
    """
    if len(targets.token_ids) != len(hidden):
        raise ValueError(f"{len(targets.token_ids)} targets for {len(hidden)} hidden states")
    shard = VocabShard.of(head, vocab_size, tp_group)
    ids = targets.token_ids.long()

    def chunk_loss(rows: slice, needs_grad: bool, logits: Tensor) -> Tensor:
        column, here = shard.locate(ids[rows])
        # One rank alone has the logit of a token, so a log-sum-exp over ranks returns it as it is.
        log_q = shard.logsumexp(shard.pick(logits, column, here)).log_softmax(1)  # [c, k]
        log_p = targets.log_probs[rows].to(log_q.dtype).log_softmax(1)
        q, gap = log_q.exp(), log_q - log_p
        terms = q * gap
        if needs_grad:
            slopes = (q * (gap + 1)).masked_fill_(terms > term_limit, 0)
            gradient = slopes.addcmul_(q, slopes.sum(1, keepdim=True), value=-1)
            logits.zero_()
            shard.add(logits, column, here, gradient)
        return terms.clamp_(max=term_limit).sum(1)

    return head_loss(hidden, head, token_weights, shard, chunk_loss, chunk_size)
