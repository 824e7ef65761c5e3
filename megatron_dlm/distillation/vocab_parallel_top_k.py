"""A teacher's k most likely tokens, from hidden states and its output layer's vocabulary shards.

Shapes: n tokens, c tokens of a chunk, h hidden size, v valid local vocabulary entries.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm.distillation.vocab_parallel_head import (
    VocabShard,
    project,
    tiled_logsumexp,
    tokens_of_chunk,
)
from megatron_dlm.types.teacher_targets import TopKTargets


@torch.no_grad()
def vocab_parallel_top_k(
    hidden: Tensor,
    head: Tensor,
    k: int,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
) -> tuple[TopKTargets, Tensor]:
    """The k most likely tokens of softmax(hidden @ head.T), without its [n, vocabulary] logits.

    Args:
        hidden: [n, h]; every rank of the group passes the same tokens.
        head: [padded_vocabulary / tp, h], this rank's rows.
        k: Tokens wanted of each distribution; ties are broken arbitrarily.
        vocab_size: Rows with an id from here on are padding: no probability.
        tp_group: Tensor-parallel group, None for one rank.
        chunk_size: Tokens projected at a time; None for `tokens_of_chunk`.

    Returns:
        Targets of n predictions with `log_rest`, and the largest logit of each [n] float32; the
        same on every rank of the group.

    Raises:
        ValueError: k does not leave out at least one token.
    """
    if not 0 < k < vocab_size:
        raise ValueError(f"k = {k} is no proper part of a vocabulary of {vocab_size}")
    shard = VocabShard.of(head, vocab_size, tp_group)
    token_ids = torch.empty(len(hidden), k, dtype=torch.int32, device=hidden.device)
    log_probs = torch.empty(len(hidden), k + 1, dtype=torch.float32, device=hidden.device)
    largest = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    chunk_size = chunk_size or tokens_of_chunk(head, shard.tp_group)
    for start in range(0, len(hidden), chunk_size):
        rows = slice(start, start + chunk_size)
        logits = project(hidden[rows], head[: shard.size])
        token_ids[rows], log_probs[rows], largest[rows] = top_k_of_logits(logits, k, shard)
        del logits  # before the next chunk's
    log_probs, log_rest = log_probs[:, :k].contiguous(), log_probs[:, k].contiguous()
    return TopKTargets(token_ids, log_probs, log_rest), largest


def top_k_of_logits(logits: Tensor, k: int, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """The k most likely ids [c, k], log-probabilities [c, k + 1], the last of all other ids.

    The third result is the largest logit [c].

    Args:
        logits: [c, v]; overwritten.
        k: Below the size of the vocabulary.
        shard: Which ids the logits are of.
    """
    top, ids = _global_top_k(logits, k, shard)
    column, here = shard.locate(ids)
    shard.add(logits, column, here, torch.full_like(top, -torch.inf))
    # With its own maximum, the mass of the rest never underflows, however little it is.
    rest = shard.logsumexp(tiled_logsumexp(logits)).unsqueeze(1)
    return ids, torch.cat([top, rest], dim=1).log_softmax(1), top[:, 0]


def _global_top_k(logits: Tensor, k: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """The k largest logits over all ranks and their vocabulary ids, [c, k] each, on every rank."""
    top, column = logits.topk(min(k, shard.size), dim=1)
    if shard.tp_group is None:
        return top, column
    # A rank may hold fewer than k ids; float64 carries values and ids exactly in one message.
    candidates = logits.new_full((2, logits.shape[0], k), -torch.inf, dtype=torch.float64)
    candidates[0, :, : top.shape[1]] = top
    candidates[1, :, : top.shape[1]] = column + shard.start
    values, ids = shard.all_gather(candidates).permute(1, 2, 0, 3).flatten(2)  # [c, tp * k]
    top, chosen = values.topk(k, dim=1)
    return top.to(logits.dtype), ids.gather(1, chosen).long()
