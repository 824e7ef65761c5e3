"""The history of a run: `history.jsonl` in its folder, one JSON object a line, only ever added to.

Every start and resume, and how each of them ended, with what is needed to repeat it: version,
commit, command, environment, and the weights that the run was started from.
"""

import functools
import importlib.metadata
import json
import math
import os
import platform
import shlex
import socket
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import megatron_dlm
from megatron_dlm.entry import rank, warn, world_size

HISTORY = "history.jsonl"

Event = Literal["started", "resumed", "stopped", "finished", "diverged", "failed"]

_PACKAGES = ("torch", "megatron-core", "transformers")

_LAUNCHER_VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_RESTART_COUNT",
    "SLURM_NNODES",
    "SLURM_JOB_NODELIST",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)
"""What is recorded of the process's environment: a fixed list, as other variables hold secrets."""


def record(
    folder: str | Path | None,
    event: Event,
    *,
    iteration: int | None,
    rollout: int | None,
    **fields: Any,
) -> None:
    """Add an event to the history of a run; rank 0 does, and other ranks do nothing.

    A history that cannot be written is a warning, no reason to end a run.

    Args:
        folder: The run folder; None for a run without one, which has no history.
        event: What happened. `started` and `resumed` are recorded with `origin()`.
        iteration: Optimizer updates done; None where nobody knows.
        rollout: Rollout batches done; None likewise.
        fields: More about it, as JSON knows it; numbers that are not finite become their names.
    """
    if folder is None or rank() != 0:
        return
    about = {"iteration": iteration, "rollout": rollout, **fields}
    if event in ("started", "resumed"):
        about |= origin()
    entry = {
        "event": event,
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        **about,
    }
    line = json.dumps(_plain(entry), allow_nan=False) + "\n"
    file = Path(folder) / HISTORY
    try:
        if _ends_amid_line(file):  # its writer was killed
            line = "\n" + line
        with file.open("a", encoding="utf-8") as opened:
            opened.write(line)
            opened.flush()
            os.fsync(opened.fileno())
    except OSError as error:
        warn(f"{file} cannot be written ({error.strerror}): no record of '{event}'")


def events(folder: str | Path) -> list[dict[str, Any]]:
    """The history of a run, oldest first; lines that cannot be read are named in a warning."""
    file = Path(folder) / HISTORY
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        warn(f"{file} cannot be read ({error.strerror})")
        return []
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict) and isinstance(entry.get("event"), str):
            found.append(entry)
        else:
            warn(f"{file}:{number} cannot be read and is left out")
    return found


def last_event(folder: str | Path) -> dict[str, Any] | None:
    """The newest event of a run; None if it has no history."""
    return next(reversed(events(folder)), None)


def origin() -> dict[str, Any]:
    """What this process is: version, commit, command and environment, for the history.

    Returns:
        `version` of this package; `commit` it was checked out at and whether tracked files were
        changed since (`uncommitted_changes`), None outside a checkout; `command`, as a shell takes
        it; `environment`: versions of Python and packages, host, world size, variables of the
        launcher.
    """
    commit, changed = _checkout(Path(megatron_dlm.__file__).resolve().parents[1])
    return {
        "version": megatron_dlm.__version__,
        "commit": commit,
        "uncommitted_changes": changed,
        "command": shlex.join(sys.orig_argv),
        "environment": {
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
            "host": socket.gethostname(),
            "working_directory": str(Path.cwd()),
            "world_size": world_size(),
            **{name: os.environ[name] for name in _LAUNCHER_VARIABLES if name in os.environ},
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _checkout(folder: Path) -> tuple[str | None, bool | None]:
    """The commit of a checkout and whether its tracked files differ; (None, None) if it is none."""
    if not (folder / ".git").exists():
        return None, None
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit, bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None  # no git, or a checkout of another user


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return finished.stdout.strip()


def _ends_amid_line(file: Path) -> bool:
    if not file.is_file() or not file.stat().st_size:
        return False
    with file.open("rb") as opened:
        opened.seek(-1, os.SEEK_END)
        return opened.read(1) != b"\n"


def _plain(value: Any) -> Any:
    """A value as JSON knows it: paths are text, infinite numbers and NaN their names."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
