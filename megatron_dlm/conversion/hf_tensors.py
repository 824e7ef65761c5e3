"""Tensors of a Hugging Face checkpoint, listed from the headers of files; needs no PyTorch."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.json_file import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = ("F64", "F32", "F16", "BF16")
"""Names of types in safetensors. Others need scales, which the architecture does not have."""


class HFTensors(Mapping[str, Any]):
    """The tensors of a checkpoint folder by name, as safetensors slices.

    Args:
        folder: Folder with `model.safetensors`, or shards and `model.safetensors.index.json`.
        field: The flag that the folder came from, for error messages.
        framework: What values are read with: PyTorch, or numpy if only headers are needed.

    Raises:
        UserError: There are no safetensors, a file is damaged, the index does not fit the files, or
            a tensor is stored quantised.
    """

    def __init__(
        self, folder: str | Path, field: str = "--load", framework: Literal["pt", "np"] = "np"
    ) -> None:
        self._folder = Path(folder)
        self._field = field
        self._framework = framework
        self._handles: dict[Path, Any] = {}
        self._files: dict[str, Path] = {}
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
        self._check_dtypes()

    def __getitem__(self, name: str) -> Any:
        """A safetensors slice: `[...]` reads values, `get_shape()` the header."""
        return self._handles[self._files[name]].get_slice(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors."""
        return {name: tuple(self[name].get_shape()) for name in self}

    def refuse(self, tensor: str, file: Path, problem: str, remedy: str) -> UserError:
        """The error for a tensor of a file."""
        return bad_value(self._field, str(file), f"tensor {tensor} {problem}", remedy)

    def _open(self, files: list[str]) -> None:
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
                handle = safe_open(file, framework=self._framework)
            except (SafetensorError, OSError) as error:
                raise bad_value(
                    self._field, str(file), f"cannot be read ({error})", "fetch the file again"
                ) from error
            self._handles[file] = handle
            for tensor in handle.keys():  # noqa: SIM118 (no mapping)
                if tensor in self._files:
                    raise self.refuse(
                        tensor, file, f"is also in {self._files[tensor].name}", "remove one of them"
                    )
                self._files[tensor] = file

    def _read_index(self, index: Path) -> dict[str, str]:
        weight_map = read_json_object(index, self._field).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise bad_value(
                self._field, str(index), "its weight_map names no files", "fetch the file again"
            )
        for file in weight_map.values():
            if file != Path(file).name:
                raise bad_value(
                    self._field,
                    str(index),
                    f"its weight_map names {file[:80]!r}, which is no file of this folder",
                    "fetch the file again from a source that you trust",
                )
        return weight_map

    def _check_index(self, weight_map: dict[str, str]) -> None:
        for tensor, file in weight_map.items():
            if self._files.get(tensor) != self._folder / file:
                raise self.refuse(
                    tensor,
                    self._folder / file,
                    f"is not in this file although {INDEX_FILE} says so",
                    "fetch the checkpoint again",
                )
        for tensor, path in self._files.items():
            if tensor not in weight_map:
                raise self.refuse(
                    tensor, path, f"is not listed in {INDEX_FILE}", "fetch the checkpoint again"
                )

    def _check_dtypes(self) -> None:
        for name, file in self._files.items():
            dtype = self[name].get_dtype()
            if dtype not in _DTYPES:
                raise self.refuse(
                    name,
                    file,
                    f"is stored as {dtype}, and quantised weights are not read",
                    "use the checkpoint in bfloat16 or float32",
                )
