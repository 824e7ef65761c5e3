"""Cross entropy on a vocabulary-parallel output layer, fused with the projection.

The loss of autoregressive training and supervised fine-tuning. Megatron's own
`vocab_parallel_cross_entropy` takes the logits of all tokens; this one takes hidden states and the
head's shard, so that [tokens, vocabulary] never exists (see `vocab_parallel_head`).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm.distillation.vocab_parallel_head import (
    VocabShard,
    head_loss,
    tiled_logsumexp,
)


def vocab_parallel_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute sum_i token_weights_i * -log softmax(hidden_i @ head.T)[labels_i], and its gradient.

    Args:
        hidden: [n, h]; every rank of the group passes the same tokens. When tp > 1 its gradient is
            this rank's partial sum: wrap it in `copy_to_tensor_model_parallel_region` (see
            `vocab_parallel_head.head_loss`).
        head: [padded_vocabulary / tp, h], this rank's rows.
        labels: [n] vocabulary ids.
        token_weights: [n].
        vocab_size: Rows with an id from here on are padding: no probability, zero gradient.
        tp_group: Tensor-parallel group, None for one rank.
        chunk_size: Tokens projected at a time; None for `tokens_of_chunk`.

    Returns:
        (loss_sum scalar with gradient, per_token [n] detached, unweighted, fp32).

    Raises:
        ValueError: Shapes disagree, or a label lies outside the vocabulary.
    """
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"{tuple(labels.shape)} labels for {hidden.shape[0]} hidden states")
    if labels.numel() and not (labels.min() >= 0 and labels.max() < vocab_size):
        raise ValueError(
            f"labels span [{labels.min()}, {labels.max()}], the vocabulary [0, {vocab_size})"
        )
    shard = VocabShard.of(head, vocab_size, tp_group)

    def chunk_loss(rows: slice, needs_grad: bool, logits: Tensor) -> Tensor:
        column, here = shard.locate(labels[rows].unsqueeze(1))
        label_logit = shard.pick(logits, column, here)
        local = torch.cat([tiled_logsumexp(logits).unsqueeze(1), label_logit], dim=1)
        # The label's logit is on one rank alone, so the log-sum-exp over ranks returns it as it is.
        normalizer, label_logit = shard.logsumexp(local).unbind(1)
        if needs_grad:
            logits.sub_(normalizer.unsqueeze(1)).exp_()
            shard.add(logits, column, here, torch.full_like(column, -1, dtype=logits.dtype))
        return normalizer - label_logit

    return head_loss(hidden, head, token_weights, shard, chunk_loss, chunk_size)
