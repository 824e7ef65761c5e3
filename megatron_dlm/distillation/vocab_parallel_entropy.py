"""Entropy of the student's distribution at a few tokens, on a vocabulary-parallel output layer."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm.distillation.vocab_parallel_head import VocabShard, project


@torch.no_grad()
def vocab_parallel_entropy(
    hidden: Tensor, head: Tensor, vocab_size: int, tp_group: dist.ProcessGroup | None = None
) -> Tensor:
    """Entropy in nats of softmax(hidden @ head.T) at each token; n is small, there are no chunks.

    With z the logits, log Z their log-sum-exp over all ranks and q = exp(z - log Z), the entropy is
    -sum q (z - log Z).

    Args:
        hidden: [n, h]; every rank of the group passes the same tokens.
        head: [padded_vocabulary / tp, h], this rank's rows.
        vocab_size: Rows with an id from here on are padding.
        tp_group: Tensor-parallel group, None for one rank.

    Returns:
        [n], in fp32 (float64 of float64), the same on all ranks.
    """
    shard = VocabShard.of(head, vocab_size, tp_group)
    logits = project(hidden, head[: shard.size])
    log_q = logits - shard.logsumexp(logits.logsumexp(-1)).unsqueeze(1)
    return shard.sum(-(log_q.exp() * log_q).sum(-1))
