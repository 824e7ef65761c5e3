"""Read tensors of a distributed checkpoint one at a time, on each rank by itself.

`dist_checkpointing.load` is called by all ranks, and fills all tensors of a model at once.
"""

import dataclasses
import io
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_dlm import platform


class TensorReader:
    """Reads what a model's sharded state describes, whether that has memory or not.

    Args:
        checkpoint: The iteration folder.
        metadata: Its index.
    """

    def __init__(self, checkpoint: Path, metadata: Metadata) -> None:
        self._metadata = metadata
        self._reader = FileSystemReader(checkpoint)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)

    def read(self, stored: ShardedTensor | ShardedTensorFactory, further: int = 0) -> Tensor:
        """A rank's part of a tensor, on the platform's device.

        Args:
            stored: This rank's part.
            further: Which part along the last axis instead: so many after it, in a circle.

        Raises:
            KeyError: The checkpoint has no such tensor.
            OSError: It cannot be read.
        """
        with_memory: Any = dataclasses.replace(
            stored, data=torch.empty_like(stored.data, device=platform.device())
        )
        if isinstance(with_memory, ShardedTensor):
            self._fill(with_memory, further)
            return with_memory.data
        parts: Any = with_memory.build()
        for part in parts:
            self._fill(part, further)
        merged: Tensor = with_memory.merge_fn([part.data for part in parts])
        return merged

    def _fill(self, stored: ShardedTensor, further: int) -> None:
        offsets, fragments = list(stored.global_offset), stored.axis_fragmentations[-1]
        size = stored.local_shape[-1]
        offsets[-1] = (offsets[-1] // size + further) % fragments * size
        sizes = (1,) * stored.prepend_axis_num + tuple(stored.local_shape)
        known = self._metadata.state_dict_metadata[stored.key]
        assert isinstance(known, TensorStorageMetadata)
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(stored.key, known, [wanted])
        filled = _OneTensor(stored.data.view(sizes))
        self._reader.read_data(LoadPlan(items), filled).wait()


def parts_along_inputs(stored: ShardedTensor | ShardedTensorFactory) -> int:
    """Parts of a tensor along its last axis, over all ranks."""
    if isinstance(stored, ShardedTensor):
        return int(stored.axis_fragmentations[-1])
    parts: Any = stored.build()
    return int(parts[0].axis_fragmentations[-1])


class _OneTensor(LoadPlanner):
    """Copies what is read into one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._tensor
        for axis, (start, size) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            part = part.narrow(axis, start, size)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It is in its place."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("a tensor is asked for")

    def set_up_planner(self, *arguments: Any, **options: Any) -> None:
        raise AssertionError("there is one rank")

    def create_local_plan(self) -> LoadPlan:
        raise AssertionError("there is one rank")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise AssertionError("there is one rank")

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise AssertionError("there is one rank")
