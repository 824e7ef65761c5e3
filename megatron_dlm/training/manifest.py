"""The manifest of a checkpoint: size and SHA-256 of each of its files, written last.

A folder with a manifest was written completely; a file that differs from it was damaged later. The
manifest itself is only checked to be valid JSON: if it is damaged otherwise, files differ from it.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dlm.output_file import sync_folder, write_file

MANIFEST = "manifest.json"
TENSOR_FILES = ".distcp"
"""Suffix of the large files, those of tensors."""

_CHUNK = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of a file.

    Attributes:
        bytes: Its size.
        sha256: Its SHA-256, hexadecimal.
    """

    bytes: int
    sha256: str


def files_of(folder: Path) -> list[str]:
    """Paths, relative to the folder and sorted, of all files that a manifest covers."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(
        path.relative_to(folder).as_posix() for path in paths if path != folder / MANIFEST
    )


def record_files(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Hash some files of a folder, and flush them to the disk."""
    records = {}
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            records[name] = FileRecord(os.fstat(file.fileno()).st_size, _sha256(file))
    return records


def write_manifest(folder: Path, records: dict[str, FileRecord]) -> None:
    """Write the manifest of a folder, and flush it and the file names to the disk."""
    with (folder / MANIFEST).open("w") as file:
        file.write(_text(records))
        file.flush()
        os.fsync(file.fileno())
    for directory in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync_folder(directory)


def replace_file(folder: Path, name: str, content: str) -> None:
    """Write a file of a published folder, and its record; it is whole at every moment.

    Meanwhile the manifest has no record of it.

    Raises:
        UserError: Something cannot be written.
        ValueError: The manifest is damaged.
    """
    records = read_manifest(folder)
    if records is not None and records.pop(name, None) is not None:
        write_file(folder / MANIFEST, _text(records), "--save")
    write_file(folder / name, content, "--save")
    if records is not None:
        records |= record_files(folder, [name])
        write_file(folder / MANIFEST, _text(records), "--save")


def _text(records: dict[str, FileRecord]) -> str:
    files = {
        name: {"bytes": record.bytes, "sha256": record.sha256}
        for name, record in sorted(records.items())
    }
    return json.dumps({"version": 1, "files": files}, indent=1) + "\n"


def read_manifest(folder: Path) -> dict[str, FileRecord] | None:
    """The manifest of a folder; None if it has none, as checkpoints of earlier versions.

    Raises:
        ValueError: It is damaged.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_bytes())
        return {
            str(name): FileRecord(int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in content["files"].items()
        }
    except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise ValueError(f"{file} is damaged") from error


def damages(folder: Path, share: tuple[int, int] | None = None) -> list[str]:
    """Differences of a folder from its manifest, each a file and a problem; empty if none.

    Args:
        folder: The checkpoint.
        share: (i, n) reads the i-th of n equal shares of all files; None reads the small ones only
            and compares the sizes of the files of tensors.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    if manifest is None:
        return []
    found = []
    for i, (name, record) in enumerate(manifest.items()):
        file = folder / name
        try:
            size = file.stat().st_size
            if size != record.bytes:
                found.append(f"{file} has {size} bytes instead of {record.bytes}")
            elif (i % share[1] == share[0]) if share else not name.endswith(TENSOR_FILES):
                with file.open("rb") as opened:
                    if _sha256(opened) != record.sha256:
                        found.append(f"{file} is not what was written (SHA-256 differs)")
        except OSError as error:
            found.append(f"{file} cannot be read ({error.strerror})")
    return found


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
