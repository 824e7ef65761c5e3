"""The file of tensors that one rank adds to a checkpoint: planned, copied, written, hashed.

Ranks agree on who writes what; then each writes a single file, in any thread, and leaves a note
beside it. No process is started for it: a thread needs no copy of the process's state, and it
cannot die and leave the others waiting.
"""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from megatron_dlm import platform
from megatron_dlm.errors import bad_value
from megatron_dlm.megatron_internals import save_planner
from megatron_dlm.output_file import write_file
from megatron_dlm.training.checkpoint_metadata import METADATA_FILE
from megatron_dlm.training.manifest import TENSOR_FILES, FileRecord

_ALIGNMENT = 64
"""Bytes at a multiple of which each tensor's copy starts."""

Content = list[tuple[WriteItem, Tensor | io.BytesIO]]
"""What a file holds, in order: tensors, or objects that are serialised already."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file.

    Attributes:
        name: Of the whole tensor.
        offsets: Of the box of it that lies there; None for an object.
        start: First byte in the file.
        length: In bytes.
    """

    name: str
    offsets: tuple[int, ...] | None
    start: int
    length: int


@dataclass(frozen=True)
class WrittenFile:
    """A rank's finished file.

    Attributes:
        name: In the checkpoint's folder.
        record: For the manifest.
        places: For the checkpoint's index.
    """

    name: str
    record: FileRecord
    places: list[Place]


class PlannedSave:
    """Plans a save for `dist_checkpointing.save` and leaves the writing to `write_tensor_file`.

    A strategy for `FullyParallelSaveStrategyWrapper`. The format is PyTorch's distributed
    checkpoint, as Megatron-Core's own strategy writes it.

    Attributes:
        backend: Name of the format.
        version: Of the format.
        can_handle_sharded_objects: Whether objects are saved as tensors are.
        content: What this rank writes, after `save`.
        metadata: On rank 0, the index of the whole checkpoint without places in files.
    """

    backend = "torch_dist"
    version = 1
    can_handle_sharded_objects = True

    def __init__(self) -> None:
        self.content: Content = []
        self.metadata: Metadata | None = None

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        """Agree with the other ranks on what each writes; collective."""
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        planner = save_planner(sharded_state_dict, is_coordinator=rank == 0)
        plan = planner.create_local_plan()
        plans: list[Any] | None = [None] * world if rank == 0 else None
        torch.distributed.gather_object(plan, plans)
        if plans is not None:
            _, self.metadata = planner.create_global_plan(plans)
        plan = planner.finish_plan(SavePlan(plan.items))
        self.content = [(item, planner.resolve_data(item)) for item in plan.items]


class HostMemory:
    """Memory of the host that takes a rank's part of a checkpoint; kept from save to save.

    As large as that part, never as the whole checkpoint.
    """

    def __init__(self) -> None:
        self._memory = platform.host_memory(0)

    @property
    def bytes(self) -> int:
        """Its size."""
        return len(self._memory)

    @torch.no_grad()
    def copy(self, content: Content) -> Content:
        """Copy tensors into this memory, in place of what it held; returns when all are there.

        Raises:
            UserError: The host has no room for them.
        """
        sizes = [
            -(-part.numel() * part.element_size() // _ALIGNMENT) * _ALIGNMENT
            if isinstance(part, Tensor)
            else 0
            for _, part in content
        ]
        if sum(sizes) > self.bytes:
            self._memory = platform.host_memory(0)  # give back before taking more
            try:
                self._memory = platform.host_memory(sum(sizes))
            except RuntimeError as error:
                raise bad_value(
                    "--async-save",
                    True,
                    f"the host has no {sum(sizes) / 1e9:.3g} GB for a copy of what this rank saves",
                    "choose --no-async-save",
                ) from error
        array, start = self._memory.numpy(), 0
        copies: Content = []
        for (item, part), size in zip(content, sizes, strict=True):
            if isinstance(part, Tensor):
                # Of an array's slice the storage has the slice's size; a tensor's view would be
                # written with all of its base.
                taken = array[start : start + part.numel() * part.element_size()]
                copy = torch.from_numpy(taken).view(part.dtype).view(part.shape)
                copy.copy_(part, non_blocking=True)
                copies.append((item, copy))
            else:
                copies.append((item, part))
            start += size
        platform.synchronize()
        return copies


class _HashedFile(io.RawIOBase):
    """A new file that is hashed as it is written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any) -> int:
        """Append bytes."""
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error  # PyTorch would pass on words of its own
            raise
        self._digest.update(data)
        self.size += len(data)
        return len(data)

    def finish(self) -> FileRecord:
        """See to it that all of it is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileRecord(self.size, self._digest.hexdigest())


@torch.no_grad()
def write_tensor_file(folder: Path, content: Content) -> WrittenFile:
    """Write what this rank adds to a checkpoint, one tensor at a time.

    Raises:
        OSError: The system refuses.
    """
    name = f"__{torch.distributed.get_rank()}_0{TENSOR_FILES}"
    file = _HashedFile(folder / name)
    places = []
    try:
        for item, part in content:
            start = file.size
            if item.type == WriteItemType.BYTE_IO:
                assert isinstance(part, io.BytesIO)
                file.write(part.getbuffer())
            else:
                assert isinstance(part, Tensor)
                torch.save(_on_host(part), file)  # type: ignore[arg-type] # it only writes
            offsets = None if item.index.offset is None else tuple(item.index.offset)
            places.append(Place(item.index.fqn, offsets, start, file.size - start))
        return WrittenFile(name, file.finish(), places)
    except RuntimeError as error:
        raise file.error or error from error


def leave_note(folder: Path, file: WrittenFile) -> None:
    """Tell rank 0 that this rank's file is there, and what it holds."""
    note = _note(folder, torch.distributed.get_rank())
    write_file(note, json.dumps(dataclasses.asdict(file)))


def has_note(folder: Path, rank: int) -> bool:
    """Whether a rank's file is there."""
    return _note(folder, rank).is_file()


def take_note(folder: Path, rank: int) -> WrittenFile:
    """Read and remove a rank's note."""
    note = _note(folder, rank)
    values = json.loads(note.read_bytes())
    note.unlink()
    places = [
        Place(name, None if offsets is None else tuple(offsets), start, length)
        for name, offsets, start, length in (place.values() for place in values["places"])
    ]
    return WrittenFile(values["name"], FileRecord(**values["record"]), places)


def _note(folder: Path, rank: int) -> Path:
    return folder / f"written_{rank}.json"


def write_index(folder: Path, metadata: Metadata, files: Iterable[WrittenFile]) -> None:
    """Write the index of a checkpoint, which says where in the files of all ranks tensors lie."""
    metadata.version = CURRENT_DCP_VERSION
    metadata.storage_data = {
        MetadataIndex(place.name, place.offsets): _StorageInfo(file.name, place.start, place.length)
        for file in files
        for place in file.places
    }
    (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))


def _on_host(tensor: Tensor) -> Tensor:
    """A tensor on the host whose storage holds nothing else, as all of it would be written."""
    tensor = tensor.detach().cpu()
    is_view = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    return tensor.clone() if is_view else tensor


T = TypeVar("T")


class BackgroundCall(threading.Thread, Generic[T]):
    """A call in a thread of its own, which does not keep the process from ending."""

    def __init__(self, call: Callable[[], T]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._call = call
        self._value: T
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Run the call; what it raises is kept for `result`."""
        try:
            self._value = self._call()
        except BaseException as error:
            self.error = error

    def result(self) -> T:
        """Wait for the call's result, or raise what it raised."""
        self.join()
        if self.error is not None:
            raise self.error
        return self._value
