"""Hugging Face checkpoints in safetensors, one file or many: slices in, a stream out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_dlm.errors import UserError, bad_value

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Rows of a matrix that are held at a time when two tensors are compared.
_COMPARED_ROWS = 16384


class HFCheckpoint:
    """Tensors of a checkpoint folder; opening it reads the files' headers, indexing one its values.

    Args:
        folder: Folder with `model.safetensors`, or shards and `model.safetensors.index.json`.
        field: What the user named the folder with, for error messages.

    Raises:
        UserError: There are no safetensors, a file is damaged, or the index does not fit the files.
    """

    def __init__(self, folder: str | Path, field: str = "--load") -> None:
        self._folder = Path(folder)
        self._field = field
        if not self._folder.is_dir():
            raise bad_value(
                field, str(folder), "is not a folder", "name a Hugging Face model folder"
            )
        index = self._folder / INDEX_FILE
        if (self._folder / SINGLE_FILE).is_file():
            self._open([SINGLE_FILE])
        elif index.is_file():
            weight_map = self._read_index(index)
            self._open(sorted(set(weight_map.values())))
            self._check_index(weight_map)
        else:
            raise bad_value(
                field,
                str(folder),
                f"holds neither {SINGLE_FILE} nor {INDEX_FILE}",
                "name a folder with weights in safetensors (pickled weights are never read)",
            )

    def check(self, shapes: Mapping[str, tuple[int, ...]], copies: Mapping[str, str]) -> None:
        """Check that the checkpoint holds exactly the tensors of the architecture.

        Args:
            shapes: Names and shapes that must be there.
            copies: Names that may be there if their values equal those of another tensor.

        Raises:
            UserError: A tensor is missing, unexpected, of the wrong shape, or differs from the one
                it has to equal.
        """
        missing = [name for name in shapes if name not in self._files]
        if missing:
            raise self._refuse(
                missing[0],
                self._folder,
                f"is missing (one of {len(missing)} missing tensors)",
                "use a complete checkpoint whose config.json belongs to its weights",
            )
        unexpected = [name for name in self._files if name not in shapes and name not in copies]
        if unexpected:
            raise self._refuse(
                unexpected[0],
                self._files[unexpected[0]],
                f"is no part of this architecture (one of {len(unexpected)} unexpected tensors)",
                "use a checkpoint whose config.json belongs to its weights",
            )
        for name, shape in shapes.items():
            found = tuple(self[name].get_shape())
            if found != shape:
                raise self._refuse(
                    name,
                    self._files[name],
                    f"has shape {list(found)} instead of {list(shape)}",
                    "use a checkpoint whose config.json belongs to its weights",
                )
        for name, original in copies.items():
            if name in self._files and not self._equal(name, original):
                raise self._refuse(
                    name,
                    self._files[name],
                    f"differs from {original} although config.json ties the embeddings",
                    "set tie_word_embeddings to false in config.json, or remove the tensor",
                )

    def __getitem__(self, name: str) -> Any:
        """A safetensors slice: `[...]` reads values, `get_shape()` the header."""
        return self._handles[self._files[name]].get_slice(name)

    def _open(self, files: list[str]) -> None:
        self._handles: dict[Path, Any] = {}
        self._files: dict[str, Path] = {}
        for name in files:
            file = self._folder / name
            if not file.is_file():
                raise bad_value(
                    self._field,
                    str(self._folder),
                    f"{INDEX_FILE} names {name}, which is not there",
                    "complete the checkpoint",
                )
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise bad_value(
                    self._field, str(file), f"cannot be read ({error})", "fetch the file again"
                ) from error
            self._handles[file] = handle
            for tensor in handle.keys():  # noqa: SIM118 (no mapping)
                if tensor in self._files:
                    raise self._refuse(
                        tensor, file, f"is also in {self._files[tensor].name}", "remove one of them"
                    )
                self._files[tensor] = file

    def _read_index(self, index: Path) -> dict[str, str]:
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise bad_value(
                self._field, str(index), "is no safetensors index", "fetch the file again"
            ) from error
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise bad_value(
                self._field, str(index), "its weight_map names no files", "fetch the file again"
            )
        return weight_map

    def _check_index(self, weight_map: dict[str, str]) -> None:
        for tensor, file in weight_map.items():
            if self._files.get(tensor) != self._folder / file:
                raise self._refuse(
                    tensor,
                    self._folder / file,
                    f"is not in this file although {INDEX_FILE} says so",
                    "fetch the checkpoint again",
                )
        for tensor, path in self._files.items():
            if tensor not in weight_map:
                raise self._refuse(
                    tensor, path, f"is not listed in {INDEX_FILE}", "fetch the checkpoint again"
                )

    def _equal(self, name: str, other: str) -> bool:
        left, right = self[name], self[other]
        if left.get_shape() != right.get_shape():
            return False
        starts = range(0, left.get_shape()[0], _COMPARED_ROWS)
        return all(
            torch.equal(left[start : start + _COMPARED_ROWS], right[start : start + _COMPARED_ROWS])
            for start in starts
        )

    def _refuse(self, tensor: str, file: Path, problem: str, remedy: str) -> UserError:
        return bad_value(self._field, str(file), f"tensor {tensor} {problem}", remedy)


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
            save_file(
                self._pending, self._folder / self._file(self._written), metadata={"format": "pt"}
            )
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
