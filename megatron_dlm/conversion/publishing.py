"""Write a folder from one process, complete or not at all; errors are raised on all ranks."""

import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_dlm.conversion.gathering import WRITER
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.output_file import (
    process_runs,
    sync_file,
    sync_folder,
    unwritable,
    writing,
)


def is_writer() -> bool:
    """Whether this process writes."""
    return dist.get_rank() == WRITER


@contextmanager
def published_folder(
    target: Path, overwrite: bool, prepare: Callable[[Path], None]
) -> Iterator[Path]:
    """A folder under a temporary name that is renamed when the block is done; all ranks enter it.

    Args:
        target: Its final name.
        overwrite: Replace an existing folder.
        prepare: Called first on the writer, with the folder; a `UserError` from it is raised on
            every rank.

    Yields:
        The temporary name.

    Raises:
        UserError: On every rank: the folder exists or cannot be written, or `prepare` raised it. On
            the writer: the disk is full.
    """
    temporary = _hidden(target, "incomplete")

    def begin() -> None:
        _tidy(target)
        if target.exists() and not overwrite:
            raise bad_value("--save", str(target), "already exists", "choose a new folder")
        temporary.mkdir(parents=True)
        prepare(temporary)

    try:
        _on_writer(begin, target)
        # What other ranks meet are failures of their messages, which keep their traceback.
        with writing(target, "--save") if is_writer() else nullcontext():
            yield temporary
            if is_writer():
                _publish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    dist.barrier()


def _on_writer(action: Callable[[], None], folder: Path) -> None:
    """Run something on the writer only; a `UserError` of it is raised on every rank."""
    outcome: list[Any] = [None]
    if is_writer():
        try:
            action()
        except UserError as error:
            outcome = [str(error)]
        except OSError as error:
            outcome = [str(unwritable(folder, "--save", error))]
    dist.broadcast_object_list(outcome, src=WRITER)
    if outcome[0] is not None:
        raise UserError(outcome[0])


def _publish(temporary: Path, target: Path) -> None:
    """Rename the finished folder; a folder that it replaces is deleted only afterwards."""
    for path in sorted(temporary.rglob("*")):
        sync_folder(path) if path.is_dir() else sync_file(path)
    sync_folder(temporary)
    old = _hidden(target, "replaced")
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _hidden(target: Path, state: str) -> Path:
    """A name beside the folder, of this process on this host."""
    return target.with_name(f".{target.name}.{state}-{socket.gethostname()}-{os.getpid()}")


def _tidy(target: Path) -> None:
    """Remove what processes of this host left when they were killed.

    A folder that one of them was about to replace is put back.
    """
    host = re.escape(socket.gethostname())
    left = re.compile(rf"\.{re.escape(target.name)}\.(incomplete|replaced)-{host}-(\d+)")
    if not target.parent.is_dir():
        return
    for path in sorted(target.parent.iterdir()):
        match = left.fullmatch(path.name)
        if match is None or process_runs(int(match[2])):
            continue
        if match[1] == "replaced" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)
