"""Memory that Linux control groups leave to this process: a container has less than its host.

Version 2 (`memory.max`) and version 1 (`memory.limit_in_bytes`) of control groups, as the kernel's
documentation describes them. A limit binds all groups below it, so the tightest one counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_UNLIMITED = 1 << 60
"""Version 1 writes no limit as the largest number of pages."""


class _Files(NamedTuple):
    """Names of a group's files; `cache` is the line of `memory.stat` that can be taken back."""

    limit: str
    usage: str
    cache: str


_VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Files("memory.max", "memory.current", "inactive_file")


def memory_left(process: Path = Path("/proc/self")) -> int | None:
    """Bytes that this process may still take; None where nothing limits them.

    Args:
        process: Has `cgroup` and `mountinfo`.
    """
    found = [
        left for folder, files in _groups(process) if (left := _left(folder, files)) is not None
    ]
    return min(found, default=None)


def _groups(process: Path) -> Iterator[tuple[Path, _Files]]:
    """Folders of the process's group and of those above it, as far as they are to be seen."""
    groups: dict[_Files, str] = {}
    for line in _lines(process / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            groups[_VERSION_2] = path
        elif "memory" in controllers.split(","):
            groups[_VERSION_1] = path
    for line in _lines(process / "mountinfo"):
        mount, _, system = line.partition(" - ")
        root, point = mount.split()[3:5]
        kind, _, options = system.split(" ", 2)  # the source may be empty
        if kind == "cgroup2":
            files = _VERSION_2
        elif kind == "cgroup" and "memory" in options.split(","):
            files = _VERSION_1
        else:
            continue
        # A container may see its own group as the root, or be named by where its host has it.
        own = PurePosixPath(groups.get(files, "/"))
        below = own.relative_to(root) if own.is_relative_to(root) else PurePosixPath()
        if ".." in below.parts:
            below = PurePosixPath()
        for part in (below, *below.parents):
            yield Path(point) / part, files


def _left(folder: Path, files: _Files) -> int | None:
    """Bytes below the limit of one group, those of its page cache included."""
    try:
        limit = (folder / files.limit).read_text().strip()
        usage = int((folder / files.usage).read_text())
        stat = (folder / "memory.stat").read_text()
        if limit == "max" or int(limit) >= _UNLIMITED:
            return None
        cache = dict(line.split() for line in stat.splitlines()).get(files.cache, "0")
        return max(int(limit) - usage + int(cache), 0)
    except (OSError, ValueError):  # the root has no such files
        return None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
