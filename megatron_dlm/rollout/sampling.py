"""Drawing tokens from hidden states, with the vocabulary split over tensor-parallel ranks.

The head's product and the pass over its logits go chunk by chunk, and the way from hidden states to
the packed result has no decision on the host that a device would have to wait for. What is drawn,
and from how many numbers: `block_draws`; on the CPU from a small vocabulary `row_draws`.

n: tokens drawn at once; h: hidden size; Vp: vocabulary padded for tensor parallelism; tp: its
ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dlm.rollout import row_draws
from megatron_dlm.rollout.block_draws import (
    TORCH_PASSES,
    VOCABULARY_BLOCK,
    DrawPasses,
    block_statistics,
    choose_tokens,
    chosen_columns,
    chunk_columns,
    draw_from_logits,
    forbid_tokens,
    padded_columns,
)

# Most logits in memory at once.
MAX_LOGITS = 1 << 26


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

    @classmethod
    def unpack(cls, packed: Tensor) -> SampledTokens:
        """From the three rows of what `sample_tokens` returns."""
        token_ids, confidence, entropy = packed
        return cls(token_ids.long(), confidence.float(), entropy.float())


def gather_from_ranks(values: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    """[...] of every rank as [tp, ...], in the order of ranks."""
    if tp_group is None or tp_group.size() == 1:
        return values[None]
    # Concatenation along dimension 0 is the one form that every backend offers.
    gathered = values.new_empty(tp_group.size() * values.shape[0], *values.shape[1:])
    dist.all_gather_into_tensor(gathered, values.contiguous(), group=tp_group)
    return gathered.view(tp_group.size(), *values.shape)


def _passes(device: torch.device) -> DrawPasses:
    """Triton's kernels on CUDA, where Triton is installed."""
    if device.type != "cuda" or find_spec("triton") is None:
        return TORCH_PASSES
    from megatron_dlm.rollout.draw_kernels import TRITON_PASSES

    return TRITON_PASSES


class KeptLogits:
    """Memory for the logits of a draw that are passed over again, the same in each draw.

    On the CPU pages of memory that was never written cost more than what is computed in them.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def empty(self, hidden: Tensor, columns: int) -> Tensor:
        """Logits [n, columns] of hidden states [n, h], not set; the last ones are overwritten."""
        if hidden.device.type != "cpu":
            return hidden.new_empty(len(hidden), columns)
        size = len(hidden) * columns
        if self._memory is None or len(self._memory) < size or self._memory.dtype != hidden.dtype:
            self._memory = hidden.new_empty(size)
        return self._memory[:size].view(len(hidden), columns)


@dataclass(frozen=True)
class Head:
    """The product of hidden states [n, h] with a shard [v, h] of the output layer, by chunks."""

    hidden: Tensor
    weight: Tensor
    vocab_start: int
    vocab_end: int
    mask_token_id: int

    @property
    def columns(self) -> int:
        """Columns of the logits, whole blocks."""
        return padded_columns(self.weight.shape[0])

    def _write(self, logits: Tensor, start: int) -> None:
        """Logits of the columns from `start` on, into a tensor of that many columns."""
        weight = self.weight[start : start + logits.shape[1]]
        torch.mm(self.hidden, weight.T, out=logits[:, : len(weight)])
        forbid_tokens(
            logits,
            first_id=self.vocab_start + start,
            vocab_size=self.vocab_end,
            mask_token_id=self.mask_token_id,
        )

    def write(self, logits: Tensor) -> None:
        """All logits at once, into [n, v]."""
        self._write(logits, 0)

    def chunks(self, logits: Tensor) -> Iterator[Tensor]:
        """Chunks of logits, in the columns of a tensor of their own or all in the same ones."""
        step = chunk_columns(logits.device)
        for start in range(0, self.columns, step):
            stop = min(start + step, self.columns)
            at = start if logits.shape[1] == self.columns else 0
            chunk = logits[:, at : at + stop - start]
            self._write(chunk, start)
            yield chunk

    def block(self, blocks: Tensor) -> Tensor:
        """Logits [n, block] of one block of each row, computed again."""
        logits = self.hidden.new_empty(len(blocks), VOCABULARY_BLOCK)
        rows = zip(blocks.tolist(), self.hidden.unbind(), logits.unbind(), strict=True)
        for block, hidden, row in rows:
            start = block * VOCABULARY_BLOCK
            weight = self.weight[start : start + VOCABULARY_BLOCK]
            torch.mv(weight, hidden, out=row[: len(weight)])
        # What `forbid_tokens` does, of all rows at once.
        columns = torch.arange(VOCABULARY_BLOCK, device=blocks.device)
        ids = self.vocab_start + blocks[:, None] * VOCABULARY_BLOCK + columns
        forbidden = (ids >= self.vocab_end) | (ids == self.mask_token_id)
        return logits.masked_fill_(forbidden, torch.finfo(logits.dtype).min)


def sample_tokens(
    hidden: Tensor,
    weight: Tensor,
    uniforms: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    mask_token_id: int,
    temperature: float,
    top_k: int,
    top_p: float,
    tp_group: ProcessGroup | None = None,
    kept_logits: KeptLogits | None = None,
) -> Tensor:
    """Draw one token for each row of hidden states.

    The distribution is softmax(logits / temperature) restricted to the `top_k` most likely tokens
    and then to the smallest set of them with mass >= `top_p` (of what top-k left). MASK and padding
    ids have probability zero. Each draw inverts the cumulative distribution over ascending ids;
    equal logits of temperature 0 go to the lowest id.

    Logits are kept in the type of the weights, at most `MAX_LOGITS` at a time; those in float32 on
    the CPU only where top-k or top-p pass over them again, or one chunk holds them all.

    Args:
        hidden: [n, h]; n may be 0.
        weight: [Vp/tp, h], this rank's shard of the output layer, of the same type.
        uniforms: [n] float64 in [0, 1), see `counter_uniforms`.
        vocab_start: Vocabulary id of the shard's first row.
        vocab_size: Ids from here on are padding.
        mask_token_id: Never drawn.
        temperature: 0 takes the most likely token.
        top_k: 0 is off.
        top_p: 1 is off.
        tp_group: Ranks that hold the other shards, ordered by `vocab_start`; None if there are
            none.
        kept_logits: Where they are kept; None: in memory of this draw.

    Returns:
        [3, n] float64: `token_ids`, `confidence` and `entropy` of `SampledTokens`; the same on
        every rank of `tp_group`.
    """
    weight = weight.detach()
    top_k = top_k if 0 < top_k < vocab_size else 0
    is_filtered = temperature > 0.0 and (top_k > 0 or top_p < 1.0)
    columns, chunk = padded_columns(weight.shape[0]), chunk_columns(hidden.device)
    is_kept = is_filtered or hidden.dtype != torch.float32 or hidden.device.type != "cpu"
    is_shared = tp_group is not None and tp_group.size() > 1
    by_rows = weight.shape[0] <= row_draws.MOST_COLUMNS and not (is_kept or is_shared)
    is_kept |= columns <= chunk
    columns = columns if is_kept else chunk

    passes = _passes(hidden.device)
    memory = kept_logits if is_kept and kept_logits is not None else KeptLogits()

    def gather(values: Tensor) -> Tensor:
        return gather_from_ranks(values, tp_group)

    packed = []
    rows = max(1, (row_draws.MOST_LOGITS if by_rows else MAX_LOGITS) // columns)
    for start in range(0, hidden.shape[0], rows):
        part, numbers = hidden[start : start + rows], uniforms[start : start + rows]
        head = Head(
            part,
            weight,
            vocab_start=vocab_start,
            vocab_end=min(vocab_size, vocab_start + weight.shape[0]),
            mask_token_id=mask_token_id,
        )
        logits = memory.empty(part, weight.shape[0] if by_rows else columns)
        if by_rows:
            head.write(logits)
            drawn = row_draws.draw_from_rows(logits, numbers, temperature)
        elif not is_kept:
            drawn = choose_tokens(
                block_statistics(head.chunks(logits), temperature),
                partial(chosen_columns, head.block, threshold=None, temperature=temperature),
                numbers,
                temperature=temperature,
                first_id=vocab_start,
                gather=gather,
            )
        else:
            statistics = None
            if passes is TORCH_PASSES:
                # A filter puts its own masses in the place of tempered ones; top-p takes a share
                # of what is there before, top-k does not look at it.
                drawn_from = 1.0 if is_filtered and top_k else temperature
                statistics = block_statistics(head.chunks(logits), drawn_from)
            else:
                head.write(logits)
            drawn = draw_from_logits(
                logits,
                numbers,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                first_id=vocab_start,
                gather=gather,
                statistics=statistics,
                passes=passes,
            )
        packed.append(drawn)
    if not packed:
        return hidden.new_empty(3, 0, dtype=torch.float64)
    return packed[0] if len(packed) == 1 else torch.cat(packed, dim=1)
