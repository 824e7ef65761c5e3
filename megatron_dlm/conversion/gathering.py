"""Gathers the shards of a model in memory, possibly parallel, on the process that writes."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm import platform

WRITER = 0
"""Global rank of the process that writes."""

ShardKey = tuple[str, int]
"""Name of a tensor in the whole model, and index of the shard."""


class ShardGatherer:
    """Sends shards to the writer, one tensor at a time; all ranks make the same calls.

    Args:
        own: This rank's shards, each with the number of shards of the whole tensor.
    """

    def __init__(self, own: Mapping[ShardKey, tuple[Tensor, int]]) -> None:
        self._own = {key: tensor.detach() for key, (tensor, _) in own.items()}
        manifest = {
            key: (tuple(tensor.shape), tensor.dtype, shards)
            for key, (tensor, shards) in own.items()
        }
        self._manifests: list[dict[ShardKey, tuple[tuple[int, ...], torch.dtype, int]]] = [
            {}
        ] * dist.get_world_size()
        dist.all_gather_object(self._manifests, manifest)
        # Data-parallel replicas hold the same shard: only the lowest rank sends it.
        self._holders: dict[ShardKey, int] = {}
        for holder, held in reversed(list(enumerate(self._manifests))):
            self._holders.update(dict.fromkeys(held, holder))

    def __contains__(self, name: str) -> bool:
        return (name, 0) in self._holders

    def gather(self, name: str) -> list[Tensor]:
        """All shards of a tensor in order, on the writer; other ranks only send and get none."""
        rank, shards = dist.get_rank(), []
        num_shards = self._manifests[self._holders[name, 0]][name, 0][2]
        for key in ((name, number) for number in range(num_shards)):
            holder = self._holders[key]
            if holder == rank == WRITER:
                shards.append(self._own[key])
            elif holder == rank:
                dist.send(self._own[key].contiguous(), dst=WRITER)
            elif rank == WRITER:
                shape, dtype, _ = self._manifests[holder][key]
                buffer = torch.empty(shape, dtype=dtype, device=platform.device())
                dist.recv(buffer, src=holder)
                shards.append(buffer)
        return shards
