"""Write a folder from one process, complete or not at all; errors are raised on all ranks."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_dlm.conversion.gathering import WRITER
from megatron_dlm.errors import UserError, bad_value


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
        UserError: On every rank: the folder exists or cannot be written, or `prepare` raised it.
    """
    temporary = target.with_name(f".{target.name}.incomplete-{os.getpid()}")

    def begin() -> None:
        if target.exists() and not overwrite:
            raise bad_value("--save", str(target), "already exists", "choose a new folder")
        temporary.mkdir(parents=True)
        prepare(temporary)

    try:
        _on_writer(begin, target)
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
            problem = f"cannot be written ({error.strerror})"
            outcome = [str(bad_value("--save", str(folder), problem, "choose another folder"))]
    dist.broadcast_object_list(outcome, src=WRITER)
    if outcome[0] is not None:
        raise UserError(outcome[0])


def _publish(temporary: Path, target: Path) -> None:
    """Rename the finished folder; a folder that it replaces is deleted only afterwards."""
    if not target.exists():
        temporary.rename(target)
        return
    old = temporary.with_name(f".{target.name}.replaced-{os.getpid()}")
    target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old)
