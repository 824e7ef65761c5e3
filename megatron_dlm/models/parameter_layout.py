"""How Hugging Face tensors become a Megatron parameter, split over tensor-parallel ranks.

Each layout has both directions: `read` makes a rank's shard from the Hugging Face tensors, reading
only the slices it needs, and `join` makes the tensors from the shards of all ranks. Both only copy.
PyTorch is imported with the first values: listing the tensors of a model does not need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class TensorSource(Protocol):
    """A tensor or a safetensors slice, whose values are read when it is indexed."""

    def __getitem__(self, index: Any) -> Tensor:
        """The values of a slice."""


class ParameterLayout(Protocol):
    """Conversion between Hugging Face tensors and the shards of one Megatron parameter."""

    def read(self, sources: Sequence[TensorSource], shape: torch.Size, rank: int) -> Tensor:
        """The shard of a rank.

        Args:
            sources: The Hugging Face tensors, in the mapping's order.
            shape: Shape of the shard.
            rank: Rank in the tensor-parallel group that the parameter is split over.
        """

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """The Hugging Face tensors, from the shards in the order of ranks (one if replicated)."""


@dataclass(frozen=True)
class Replicated:
    """The same on every rank: norms, routers."""

    def read(self, sources: Sequence[TensorSource], shape: torch.Size, rank: int) -> Tensor:
        """See `ParameterLayout`."""
        return sources[0][:]

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """See `ParameterLayout`."""
        return [shards[0]]


@dataclass(frozen=True)
class RowParallel:
    """Split along the input dimension, the second one: projections back to the hidden size."""

    def read(self, sources: Sequence[TensorSource], shape: torch.Size, rank: int) -> Tensor:
        """See `ParameterLayout`."""
        return sources[0][:, rank * shape[1] : (rank + 1) * shape[1]]

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """See `ParameterLayout`."""
        return [concatenated(shards, dim=1)]


@dataclass(frozen=True)
class GateUp:
    """Gate and up projection in one matrix; every rank holds [its gate rows; its up rows]."""

    def read(self, sources: Sequence[TensorSource], shape: torch.Size, rank: int) -> Tensor:
        """See `ParameterLayout`."""
        rows = shape[0] // 2
        return concatenated([source[rank * rows : (rank + 1) * rows] for source in sources])

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """See `ParameterLayout`."""
        halves = [shard.chunk(2) for shard in shards]
        return [concatenated([half[part] for half in halves]) for part in (0, 1)]


@dataclass(frozen=True)
class QueryKeyValue:
    """Query, key and value projection in one matrix, or their biases, interleaved by query group.

    The rows of a group are those of its query heads, its key head, its value head; groups are split
    over the ranks.

    Attributes:
        heads_per_group: Query heads that share a key/value head.
        head_size: Rows of one head.
    """

    heads_per_group: int
    head_size: int

    def read(self, sources: Sequence[TensorSource], shape: torch.Size, rank: int) -> Tensor:
        """See `ParameterLayout`."""
        groups = shape[0] // ((self.heads_per_group + 2) * self.head_size)
        parts = []
        for source, heads in zip(sources, (self.heads_per_group, 1, 1), strict=True):
            rows = groups * heads * self.head_size
            part = source[rank * rows : (rank + 1) * rows]
            parts.append(part.reshape(groups, heads * self.head_size, *shape[1:]))
        return concatenated(parts, dim=1).reshape(shape)

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """See `ParameterLayout`."""
        rows = [heads * self.head_size for heads in (self.heads_per_group, 1, 1)]
        inputs = shards[0].shape[1:]
        grouped = concatenated(shards).view(-1, sum(rows), *inputs)
        return [part.reshape(-1, *inputs) for part in grouped.split(rows, dim=1)]


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the vocabulary split over the ranks; rows beyond it are Megatron's padding, zeros.

    Attributes:
        vocab_size: Rows of the Hugging Face tensor.
    """

    vocab_size: int

    def read(self, sources: Sequence[TensorSource], shape: torch.Size, rank: int) -> Tensor:
        """See `ParameterLayout`."""
        start = min(rank * shape[0], self.vocab_size)
        end = min((rank + 1) * shape[0], self.vocab_size)
        rows = sources[0][start:end]
        return concatenated((rows, rows.new_zeros(shape[0] - len(rows), shape[1])))

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """See `ParameterLayout`."""
        return [concatenated(shards)[: self.vocab_size].contiguous()]


def concatenated(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The parts in one tensor."""
    import torch

    return torch.cat(list(parts), dim=dim)
