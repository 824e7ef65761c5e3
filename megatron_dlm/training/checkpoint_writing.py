"""Write a checkpoint completely or not at all, with one-line errors."""

import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dlm import platform
from megatron_dlm.errors import bad_value
from megatron_dlm.output_file import write_file
from megatron_dlm.training.run_folder import LATEST, iteration_folder, latest_iteration

UNREADABLE = (
    CheckpointingException,
    CheckpointException,  # torch's, a BaseException
    OSError,
    EOFError,
    pickle.UnpicklingError,
)
"""Exceptions of reading a damaged checkpoint, or of writing to a full disk."""


def bytes_of(state: dict[str, Any]) -> int:
    """Bytes that the tensors of a sharded state take on the disk, over all ranks."""

    def local(value: Any) -> int:
        if isinstance(value, dict):
            return sum(local(part) for part in value.values())
        if isinstance(value, (list, tuple)):
            return sum(local(part) for part in value)
        if isinstance(value, ShardedTensorFactory):
            return local(value.build())
        if isinstance(value, dist_checkpointing.ShardedTensor):
            is_written = value.data is not None and _is_written_copy(value.replica_id)
            return value.data.numel() * value.data.element_size() if is_written else 0
        return 0

    total = torch.tensor(local(state), dtype=torch.int64, device=platform.device())
    torch.distributed.all_reduce(total)
    return int(total)


def _is_written_copy(replica_id: int | tuple[int, ...]) -> bool:
    """Whether this copy of a tensor is the one that is written."""
    return not any(replica_id) if isinstance(replica_id, tuple) else replica_id == 0


@contextmanager
def writing_checkpoint(final: Path) -> Iterator[None]:
    """Raise a one-line error if a checkpoint cannot be written."""
    try:
        yield
    except (*UNREADABLE, RuntimeError) as error:
        number = getattr(error, "errno", None)
        if number is None and not isinstance(error, CheckpointException):
            raise
        reason = str(error).strip().splitlines()[-1] if number is None else os.strerror(number)
        last = latest_iteration(final.parent)
        again = "start again"
        if last is not None:
            again += f" from {iteration_folder(final.parent, last).name}"
        raise bad_value(
            "--save",
            str(final.parent),
            f"{final.name} could not be written ({reason})",
            f"make room there or repair it, and {again}",
        ) from error


def write_latest(run_folder: str | Path, iteration: int) -> None:
    """Make a checkpoint the run's newest."""
    write_file(Path(run_folder) / LATEST, f"{iteration}\n", "--save")


def publish(temporary: Path, final: Path, iteration: int) -> None:
    """Give a complete checkpoint its name, and make it the run's newest."""
    replaced = final.with_name(final.name + ".old")
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    write_latest(final.parent, iteration)
