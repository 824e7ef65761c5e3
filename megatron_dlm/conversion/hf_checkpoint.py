"""Read slices of Hugging Face checkpoints in safetensors, and write checkpoints as a stream."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_dlm.conversion.hf_tensors import INDEX_FILE, SINGLE_FILE, HFTensors
from megatron_dlm.errors import UserError

# Rows of a matrix in memory at a time when its values are checked.
_ROWS = 16384


def is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether no value is NaN or infinite after conversion to a type; makes no whole copy."""
    if not tensor.numel():
        return True
    return all(bool(end.to(dtype).isfinite()) for end in torch.aminmax(tensor))


class HFCheckpoint(HFTensors):
    """Tensors of a checkpoint folder: opening reads the headers of files, indexing reads values.

    Args:
        folder: Folder with `model.safetensors`, or shards and `model.safetensors.index.json`.
        field: The flag that the folder came from, for error messages.

    Raises:
        UserError: As in `HFTensors`.
    """

    def __init__(self, folder: str | Path, field: str = "--load") -> None:
        super().__init__(folder, field, framework="pt")

    def check(self, shapes: Mapping[str, tuple[int, ...]], copies: Mapping[str, str]) -> None:
        """Check that the checkpoint holds exactly the tensors of the architecture.

        Args:
            shapes: Names and shapes that must be there.
            copies: Names that may be there if their values equal those of another tensor.

        Raises:
            UserError: A tensor is missing, unexpected, of the wrong shape, or differs from the
                tensor that it must equal.
        """
        missing = [name for name in shapes if name not in self]
        if missing:
            raise self.refuse(
                missing[0],
                self._folder,
                f"is missing (one of {len(missing)} missing tensors)",
                "use a complete checkpoint whose config.json belongs to its weights",
            )
        unexpected = [name for name in self if name not in shapes and name not in copies]
        if unexpected:
            raise self.refuse(
                unexpected[0],
                self.file(unexpected[0]),
                f"is no part of this architecture (one of {len(unexpected)} unexpected tensors)",
                "use a checkpoint whose config.json belongs to its weights",
            )
        for name, shape in shapes.items():
            found = tuple(self[name].get_shape())
            if found != shape:
                raise self.refuse(
                    name,
                    self.file(name),
                    f"has shape {list(found)} instead of {list(shape)}",
                    "use a checkpoint whose config.json belongs to its weights",
                )
        for name, original in copies.items():
            if name in self and not self._equal(name, original):
                raise self.refuse(
                    name,
                    self.file(name),
                    f"differs from {original} although config.json ties the embeddings",
                    "set tie_word_embeddings to false in config.json, or remove the tensor",
                )

    def broken(self, names: Iterable[str], dtype: torch.dtype) -> UserError:
        """The error for tensors whose values are not all finite in the type of the model."""
        names = list(names)
        name = next((name for name in names if not self._is_finite(name, dtype)), names[0])
        return self.refuse(
            name,
            self.file(name),
            f"holds NaN or infinite values, read as {str(dtype).removeprefix('torch.')}",
            "fetch the file again, or use another checkpoint",
        )

    def _is_finite(self, name: str, dtype: torch.dtype) -> bool:
        values = self[name]
        rows = range(0, values.get_shape()[0], _ROWS)
        return all(is_finite(values[start : start + _ROWS], dtype) for start in rows)

    def _equal(self, name: str, other: str) -> bool:
        left, right = self[name], self[other]
        if left.get_shape() != right.get_shape():
            return False
        rows = range(0, left.get_shape()[0], _ROWS)
        return all(
            torch.equal(left[start : start + _ROWS], right[start : start + _ROWS]) for start in rows
        )


def write_safetensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write one file of tensors, as transformers does, with the permissions of the umask.

    Raises:
        OSError: The system refuses.
    """
    # safetensors makes files readable by their owner only.
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        # It has the system's error as text only, as Rust writes it.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error
    file.chmod(mode)


class HFCheckpointWriter:
    """Writes tensors in a known order into safetensors files of a limited size.

    One file's tensors are in memory at a time.

    Args:
        folder: Existing folder to write into.
        shapes: All tensors, in the order in which they will be added.
        dtype: Type they will be stored in.
        max_shard_size: Bytes of a file; a larger tensor gets a file of its own.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        max_shard_size: int,
    ) -> None:
        self._folder = folder
        self._dtype = dtype
        sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
        self._total_size = sum(sizes.values())
        self._shards: list[list[str]] = [[]]
        used = 0
        for name, size in sizes.items():
            if self._shards[-1] and used + size > max_shard_size:
                self._shards.append([])
                used = 0
            self._shards[-1].append(name)
            used += size
        self._pending: dict[str, Tensor] = {}
        self._written = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor; a file is written when its last tensor has arrived."""
        shard = self._shards[self._written]
        assert name == shard[len(self._pending)], f"{name} is not the next tensor"
        self._pending[name] = tensor.to(device="cpu", dtype=self._dtype).contiguous()
        if len(self._pending) == len(shard):
            write_safetensors(self._pending, self._folder / self._file(self._written))
            self._pending = {}
            self._written += 1

    def close(self) -> None:
        """Write the index, if there is more than one file."""
        assert self._written == len(self._shards), "tensors are missing"
        if len(self._shards) == 1:
            return
        weight_map = {
            name: self._file(number) for number, shard in enumerate(self._shards) for name in shard
        }
        index = {"metadata": {"total_size": self._total_size}, "weight_map": weight_map}
        (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def _file(self, number: int) -> str:
        if len(self._shards) == 1:
            return SINGLE_FILE
        return f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
