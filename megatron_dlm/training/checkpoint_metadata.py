"""Read the index of a distributed checkpoint without running code that may be hidden in it.

PyTorch writes the index, `.metadata`, as a pickle, and small objects among the tensors as pickles
too, and reads both without limits. Here the index may only ask for the classes that an index is
made of, and the objects for what `torch.load(weights_only=True)` allows; what passes is safe to be
read again by PyTorch and Megatron-Core.
"""

import io
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_dlm.errors import bad_value

METADATA_FILE = ".metadata"

_CLASSES = {
    "collections": {"OrderedDict"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}


class _UnsafeCheckpointError(Exception):
    """A checkpoint refers to a class that no checkpoint needs; reading it could run code."""


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles objects of an index's classes only."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _UnsafeCheckpointError(f"asks for {module}.{name}, which is no part of a checkpoint")


def _read_metadata(checkpoint: Path) -> Metadata:
    """The index of a distributed checkpoint.

    Args:
        checkpoint: The folder.

    Raises:
        _UnsafeCheckpointError: Index or objects ask for other classes than a checkpoint has, or the
            index names a file outside the folder.
        ValueError: The index, or an object that it names, is damaged.
    """
    file = checkpoint / METADATA_FILE
    try:
        metadata = _IndexUnpickler(io.BytesIO(file.read_bytes())).load()
    except (_UnsafeCheckpointError, MemoryError):
        raise
    except Exception as error:  # A damaged pickle may raise anything.
        raise ValueError(f"{file} is damaged") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError(f"{file} is no index of a checkpoint")
    objects = {
        name
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, BytesStorageMetadata)
    }
    for index, info in metadata.storage_data.items():
        path = PurePosixPath(info.relative_path)
        if path.is_absolute() or ".." in path.parts:
            raise _UnsafeCheckpointError(f"names the file {str(path)!r} outside its folder")
        if index.fqn in objects:
            _check_object(checkpoint / path, index.fqn, info.offset, info.length)
    return metadata


def checked_metadata(checkpoint: Path, field: str) -> Metadata:
    """The index of a distributed checkpoint that is safe to be read by others too.

    Args:
        checkpoint: The iteration folder.
        field: What the user named it with, for error messages.

    Raises:
        UserError: The index is damaged, or asks for what no checkpoint needs.
    """
    try:
        return _read_metadata(checkpoint)
    except _UnsafeCheckpointError as error:
        remedy = "do not load it unless you know who made it, and ask them for another copy"
        raise bad_value(field, str(checkpoint), str(error), remedy) from error
    except ValueError as error:
        raise bad_value(field, str(checkpoint), str(error), "load another checkpoint") from error


def _check_object(file: Path, name: str, offset: int, length: int) -> None:
    """Read an object as plain data: tensors, numbers, strings and containers of them."""
    try:
        with file.open("rb") as opened:
            opened.seek(offset)
            torch.load(io.BytesIO(opened.read(length)), weights_only=True)
    except pickle.UnpicklingError as error:
        raise _UnsafeCheckpointError(f"{name} in {file.name} is no plain data") from error
    except Exception as error:
        raise ValueError(f"{file} is damaged ({name} cannot be read)") from error
