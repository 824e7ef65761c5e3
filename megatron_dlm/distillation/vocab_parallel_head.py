"""Losses on an output layer whose [tokens, vocabulary] logits never exist whole.

`head_loss` walks the tokens in chunks, projects each chunk on the local shard of the vocabulary,
hands the logits to a loss that replaces them by its derivative, and folds that derivative into the
gradients of hidden states and head at once. Peak memory is O(chunk_size x vocabulary / tp) next to
the gradients themselves; the backward pass only scales what the forward pass computed.

Shapes: n tokens, c tokens of a chunk, h hidden size, v valid local vocabulary entries, tp ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dlm import platform

TILE_ELEMENTS = 1 << 22
"""Elements that elementwise passes over a chunk take at a time, which bounds their temporaries."""

PRODUCT_ELEMENTS = 1 << 24
"""Elements of the head's gradient whose product is in memory at a time where it is in bf16."""

CHUNK_BYTES = 640 << 20
"""Most memory of a chunk's logits and their derivative; with it, all temporaries of the loss stay
below 1 GiB."""

ChunkLoss = Callable[[slice, bool, Tensor], Tensor]
"""loss(rows, needs_grad, logits [c, v]) -> per-token loss [c].

`rows` are the chunk's rows among the n tokens. The loss owns `logits`: where needs_grad it leaves
d loss / d logits in them.
"""


@dataclass(frozen=True)
class VocabShard:
    """The vocabulary entries [start, start + size) that this rank holds, and reductions over ranks.

    Padding (ids >= vocab_size) can only trail a shard, so leaving it out of the softmax is a slice.
    """

    start: int
    size: int
    tp_group: dist.ProcessGroup | None

    @classmethod
    def of(cls, head: Tensor, vocab_size: int, tp_group: dist.ProcessGroup | None) -> "VocabShard":
        """Locate a head shard [padded_vocabulary / tp, h] in the vocabulary.

        Raises:
            ValueError: The shards of all ranks together do not hold `vocab_size` rows.
        """
        rank, world_size = _rank_and_size(tp_group)
        rows = head.shape[0]
        if rows * world_size < vocab_size:
            raise ValueError(
                f"{world_size} head shards of {rows} rows cannot hold {vocab_size} vocabulary rows"
            )
        start, stop = _valid_rows(rank, rows, vocab_size)
        return cls(start, stop - start, tp_group if world_size > 1 else None)

    def all_gather(self, local: Tensor) -> Tensor:
        """Stack a tensor of every rank: [...] -> [tp, ...]."""
        if self.tp_group is None:
            return local.unsqueeze(0)
        world_size = self.tp_group.size()
        # gloo gathers along the first dimension only.
        gathered = local.new_empty(world_size * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=self.tp_group)
        return gathered.view(world_size, *local.shape)

    def logsumexp(self, local: Tensor) -> Tensor:
        """Elementwise log-sum-exp over ranks; -inf stands for "nothing on this rank"."""
        return local if self.tp_group is None else self.all_gather(local).logsumexp(0)

    def sum(self, local: Tensor) -> Tensor:
        """Elementwise sum over ranks, in place."""
        if self.tp_group is not None:
            dist.all_reduce(local, group=self.tp_group)
        return local

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Map vocabulary ids to local columns: (column, 0 where absent; whether it is here)."""
        column = ids - self.start
        here = (column >= 0) & (column < self.size)
        return column.masked_fill(~here, 0), here

    def pick(self, logits: Tensor, column: Tensor, here: Tensor) -> Tensor:
        """Read logits [c, v] at columns [c, k]; -inf where an entry is on another rank."""
        if self.size == 0:
            return logits.new_full(column.shape, -torch.inf)
        return logits.gather(1, column).masked_fill_(~here, -torch.inf)

    def add(self, logits: Tensor, column: Tensor, here: Tensor, values: Tensor) -> None:
        """Add values [c, k] to logits [c, v] at columns [c, k], leaving out those not here."""
        if self.size > 0:
            # Adding zero to a column spares the device synchronisation that selecting would cost.
            logits.scatter_add_(1, column, values.masked_fill(~here, 0))


def tiled_logsumexp(logits: Tensor) -> Tensor:
    """Log-sum-exp over the last dimension, [c, v] -> [c], without a temporary of its size."""
    if logits.shape[1] == 0:
        return logits.new_full(logits.shape[:1], -torch.inf)
    return torch.cat([tile.logsumexp(-1) for tile in logits.split(tile_rows(logits))])


def tokens_of_chunk(head: Tensor, tp_group: dist.ProcessGroup | None) -> int:
    """Tokens to project at a time, the same on every rank of the group.

    As many as `CHUNK_BYTES` hold, since every chunk reads and writes the gradient of the whole
    head; on CUDA no more than a quarter of the memory that is free now.

    Args:
        head: [padded_vocabulary / tp, h]; every rank of the group has as many rows.
        tp_group: Tensor-parallel group, None for one rank.
    """
    # Logits of student and teacher, and the derivative in the head's dtype where that is shorter.
    width = torch.promote_types(head.dtype, torch.float32).itemsize
    bytes_of_token = head.shape[0] * (2 * width + 2 * (head.itemsize < width) * head.itemsize)
    free = platform.free_memory()
    if free is None:
        return whole_tiles(CHUNK_BYTES // bytes_of_token)
    tokens = min(CHUNK_BYTES, free // 4) // bytes_of_token
    if tp_group is not None:
        least = torch.tensor(tokens, device=head.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=tp_group)
        tokens = int(platform.to_host(least))
    return whole_tiles(tokens)


def whole_tiles(tokens: int) -> int:
    """Down to a multiple of 64, which kernels like, but at least 16."""
    return max(16, tokens // 64 * 64)


def tile_rows(logits: Tensor) -> int:
    """Rows of [c, v] that make one tile of an elementwise pass."""
    return max(1, TILE_ELEMENTS // max(1, logits.shape[1]))


def project(hidden: Tensor, head: Tensor) -> Tensor:
    """Logits [c, v] of hidden [c, h] and head [v, h]: product in their dtype, then fp32.

    This is the rounding of Megatron's output layer. float64 stays float64, for gradient checks.
    """
    return (hidden @ head.t()).to(torch.promote_types(head.dtype, torch.float32))


def head_loss(
    hidden: Tensor,
    head: Tensor,
    token_weights: Tensor,
    shard: VocabShard,
    loss: ChunkLoss,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Sum a per-token loss of the logits hidden @ head.T, weighted, chunk by chunk.

    Args:
        hidden: [n, h]. Its gradient is this rank's partial sum when tp > 1: it misses the other
            shards' share until the caller reduces it over the group, which Megatron's
            `copy_to_tensor_model_parallel_region` (or, under sequence parallelism,
            `gather_from_sequence_parallel_region`) around `hidden` does in its backward.
        head: [padded_vocabulary / tp, h], same dtype as hidden. Padding rows get zero gradient.
        token_weights: [n], constants of the sum.
        shard: Where `head` lies in the vocabulary.
        loss: Loss of one chunk.
        chunk_size: Tokens projected at a time; None for `tokens_of_chunk`.

    Returns:
        The weighted sum (scalar, differentiable once) and the unweighted losses [n] (detached).
    """
    n = hidden.shape[0]
    if token_weights.shape != (n,):
        raise ValueError(f"token_weights has shape {tuple(token_weights.shape)}, expected ({n},)")
    if chunk_size is None:
        chunk_size = tokens_of_chunk(head, shard.tp_group)
    # Inside autograd.Function, needs_input_grad is true under no_grad as well.
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    loss_sum, per_token = _HeadLoss.apply(
        hidden, head, token_weights, shard, loss, chunk_size, needs_grad
    )
    return loss_sum, per_token


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        token_weights: Tensor,
        shard: VocabShard,
        loss: ChunkLoss,
        chunk_size: int,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(head.dtype, torch.float32)
        token_weights = token_weights.to(dtype)
        per_token = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)
        grad_hidden = grad_head = None
        if needs_grad and ctx.needs_input_grad[0]:
            grad_hidden = torch.empty_like(hidden)
        if needs_grad and ctx.needs_input_grad[1]:
            # Chunks add up in fp32: in bf16 the small late contributions would be lost.
            grad_head = torch.zeros_like(head, dtype=dtype)

        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            # A function of its own, so that one chunk's buffers are gone when the next begins.
            per_token[rows] = _chunk(
                hidden[rows],
                head[: shard.size],
                token_weights[rows],
                None if grad_hidden is None else grad_hidden[rows],
                None if grad_head is None else grad_head[: shard.size],
                partial(loss, rows, needs_grad),
            )

        ctx.grads = (grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(per_token)
        return (per_token * token_weights).sum(), per_token

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # The gradients are scaled in place and given away, which spares a copy of the head.
        if ctx.grads is None:
            raise RuntimeError("this loss gave its gradients away in its first backward pass")
        grad_hidden, grad_head = ctx.grads
        ctx.grads = None
        if grad_hidden is not None:
            grad_hidden.mul_(grad_sum)
        if grad_head is not None:
            grad_head = grad_head.mul_(grad_sum).to(ctx.head_dtype)
        return grad_hidden, grad_head, None, None, None, None, None


def _chunk(
    hidden: Tensor,
    head: Tensor,
    token_weights: Tensor,
    grad_hidden: Tensor | None,
    grad_head: Tensor | None,
    loss: Callable[[Tensor], Tensor],
) -> Tensor:
    """One chunk: its losses [c]; writes grad_hidden [c, h], adds to grad_head [v, h]."""
    logits = project(hidden, head)
    per_token = loss(logits)
    if grad_hidden is None and grad_head is None:
        return per_token
    grad_logits = logits.mul_(token_weights.unsqueeze(1)).to(head.dtype)
    if grad_hidden is not None:
        torch.mm(grad_logits, head, out=grad_hidden)
    if grad_head is not None:
        _add_product_(grad_head, grad_logits, hidden)
    return per_token


def _add_product_(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """Add grad_logits [c, v].T @ hidden [c, h] to total [v, h], without a temporary of its size."""
    if total.dtype == grad_logits.dtype:
        total.addmm_(grad_logits.t(), hidden)
        return
    # bf16 products cannot be added to fp32 in place: a few rows at a time, which stay in the cache.
    rows = max(1, PRODUCT_ELEMENTS // hidden.shape[1])
    for part, columns in zip(total.split(rows), grad_logits.split(rows, dim=1), strict=True):
        part.add_(columns.t() @ hidden)


def _rank_and_size(tp_group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if tp_group is None else (tp_group.rank(), tp_group.size())


def _valid_rows(rank: int, rows_per_rank: int, vocab_size: int) -> tuple[int, int]:
    start, stop = rank * rows_per_rank, (rank + 1) * rows_per_rank
    return min(start, vocab_size), min(stop, vocab_size)
