"""A process group of a trainer and the servers that decode for it, to send weights through.

It is made as SGLang makes its own (`init_weights_update_group`): a store at the trainer's address,
the group's name as a prefix, rank 0 the trainer. It is not registered in torch.distributed, whose
default group it has nothing to do with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

_DEVICES = {"gloo": "cpu", "nccl": "cuda"}
"""Device in the names of keys that torch gives a group of each backend."""


@dataclass(frozen=True)
class Bucket:
    """Tensors that are sent together.

    Attributes:
        names: In a Hugging Face checkpoint.
        dtypes: As attributes of torch are called.
        shapes: Of each.
    """

    names: Sequence[str]
    dtypes: Sequence[str]
    shapes: Sequence[Sequence[int]]

    @classmethod
    def of(cls, tensors: Sequence[tuple[str, Tensor]]) -> Bucket:
        """The description of tensors."""
        return cls(
            [name for name, _ in tensors],
            [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
            [list(tensor.shape) for _, tensor in tensors],
        )

    def types(self) -> list[torch.dtype]:
        """The types of the tensors.

        Raises:
            ValueError: One is unknown, or the lists are not of one length.
        """
        if not len(self.names) == len(self.dtypes) == len(self.shapes):
            raise ValueError("names, dtypes and shapes have different lengths")
        types = [getattr(torch, name, None) for name in self.dtypes]
        for name, dtype in zip(self.dtypes, types, strict=True):
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"dtypes: {name} is unknown")
        return [dtype for dtype in types if dtype is not None]


def flattened(tensors: Sequence[tuple[str, Tensor]]) -> Tensor:
    """The bytes of tensors end to end, [bytes] uint8: SGLang's `flattened_bucket`."""
    return torch.cat([t.detach().contiguous().flatten().view(torch.uint8) for _, t in tensors])


def unflattened(flat: Tensor, bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a `flattened` bucket, views of it."""
    start = 0
    for name, dtype, shape in zip(bucket.names, bucket.types(), bucket.shapes, strict=True):
        size = math.prod(shape) * dtype.itemsize
        yield name, flat[start : start + size].view(dtype).view(*shape)
        start += size


class WeightGroup:
    """Ranks that weights are broadcast to from rank 0.

    Args:
        backend: Of torch.distributed, which the caller has made.
        timeout: Of each broadcast.
    """

    def __init__(self, backend: Any, timeout: timedelta) -> None:
        self._backend = backend
        self._timeout = timeout

    def begin_broadcast(self, tensor: Tensor) -> Any:
        """Start to send a tensor, or to receive into it; returns torch's work."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = self._timeout
        return self._backend.broadcast([tensor], options)

    def receive(
        self, bucket: Bucket, *, flat: bool, device: torch.device
    ) -> list[tuple[str, Tensor]]:
        """The tensors of a bucket that rank 0 sends now.

        Args:
            bucket: What is sent.
            flat: Whether it comes as one tensor of bytes, else tensor by tensor.
            device: Of this process.

        Raises:
            ValueError: A type is unknown.
        """
        types = bucket.types()
        if flat:
            sizes = [
                math.prod(shape) * dtype.itemsize
                for shape, dtype in zip(bucket.shapes, types, strict=True)
            ]
            received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
            self.begin_broadcast(received).wait()
            return list(unflattened(received, bucket))
        tensors = [
            torch.empty(list(shape), dtype=dtype, device=device)
            for shape, dtype in zip(bucket.shapes, types, strict=True)
        ]
        for work in [self.begin_broadcast(tensor) for tensor in tensors]:
            work.wait()
        return list(zip(bucket.names, tensors, strict=True))


def open_store(timeout: timedelta) -> TCPStore:
    """The store of a group, kept by this process at a free port (`port`)."""
    return TCPStore(
        "0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timeout, use_libuv=True
    )


def weight_group(
    store: Store, name: str, *, rank: int, size: int, backend: str, timeout: timedelta
) -> WeightGroup:
    """Join a group; returns when all ranks have (NCCL: with the first broadcast).

    Args:
        store: Where the ranks meet.
        name: Of the group.
        rank: Of this process, 0 the trainer.
        size: Number of ranks.
        backend: `nccl` or `gloo`.
        timeout: Of meeting, and of each broadcast.

    Raises:
        RuntimeError: The others did not come.
    """
    # The prefixes of torch.distributed's groups, and the one that SGLang puts before them.
    for prefix in (name, f"{name}/", f"{_DEVICES[backend]}/"):
        store = PrefixStore(prefix, store)
    made: Any
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        made = dist.ProcessGroupNCCL(store, rank, size, options)
    else:
        made = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
    return WeightGroup(made, timeout)


def join_weight_group(
    name: str, address: str, port: int, *, rank: int, size: int, backend: str, timeout: timedelta
) -> WeightGroup:
    """Join the group of a trainer whose store is at an address; see `weight_group`."""
    store = TCPStore(address, port, is_master=False, timeout=timeout, use_libuv=True)
    return weight_group(store, name, rank=rank, size=size, backend=backend, timeout=timeout)
