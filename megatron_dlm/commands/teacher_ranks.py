"""The ranks of a training job that hold only the teacher (`--teacher-ranks`), and its others."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_dlm.config import Config, validate_teacher
from megatron_dlm.entry import DIVERGED_STATUS, USER_ERROR_STATUS
from megatron_dlm.errors import TrainingDiverged, UserError
from megatron_dlm.parallel import Side, from_rank_zero, initialized
from megatron_dlm.serving.options import TeacherServerConfig
from megatron_dlm.serving.teacher_queue import TeacherQueue
from megatron_dlm.serving.teacher_server import serve_teacher
from megatron_dlm.stop_request import StopRequest
from megatron_dlm.teacher.job_line import JobLine, new_key
from megatron_dlm.training.model_source import open_model_source

FAILED_STATUS = 1

MOST_BYTES = 1 << 30
"""Of a request between processes of one job."""


@dataclass
class Ended:
    """How the student's side ends.

    Attributes:
        status: Of its processes.
    """

    status: int = FAILED_STATUS


@contextmanager
def ends_teacher(config: Config, line: JobLine) -> Iterator[Ended]:
    """Around what the student's ranks do: the teacher's end when they do, and as they do."""
    ended = Ended()
    try:
        yield ended
    except UserError as error:
        diverged = isinstance(error, TrainingDiverged)
        ended.status = DIVERGED_STATUS if diverged else USER_ERROR_STATUS
        raise
    finally:
        if Side.of(config).rank == 0:
            line.end(ended.status, config.teacher.teacher_ranks)


def hold_teacher(config: Config, request: StopRequest, line: JobLine) -> int:
    """What a rank of the teacher does: it answers the student's ranks until these end.

    Args:
        config: Of the run.
        request: What this process is asked to; passed on, as it has nothing to save.
        line: To the student's ranks.

    Returns:
        Their exit status.
    """
    field = "--teacher-load" if config.distillation.teacher_load else "--load"
    source = open_model_source(str(config.teacher_load), field, config.model.verify_checkpoint)
    validate_teacher(config, source.architecture)
    if (status := from_rank_zero(line.ended)) is not None:  # nothing was left to do
        line.leave(Side.of(config).rank)
        return status
    own, side, key = config.of_teacher(), Side.of(config), from_rank_zero(new_key)
    address = _own_address()
    options = TeacherServerConfig(
        host="127.0.0.1" if address == "127.0.0.1" else "0.0.0.0",
        port=0,
        api_key=key,
        max_request_bytes=MOST_BYTES,
        request_timeout_s=config.teacher.teacher_timeout_s,
    )

    def is_over(queue: TeacherQueue) -> bool:
        if request.code:
            line.ask_to_stop(request.code)
        return line.ended() is not None

    with initialized(own):
        serve_teacher(
            source,
            own,
            options,
            address=address,
            announce=lambda urls: line.publish(urls, key),
            is_over=is_over,
        )
    status = line.ended()
    line.leave(side.rank)
    return FAILED_STATUS if status is None else status


def _own_address() -> str:
    """The address by which this host reaches the job's first one, and is reached itself."""
    first = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if first in ("localhost", "127.0.0.1", "::1"):
        return "127.0.0.1"
    family, kind, _, _, place = socket.getaddrinfo(first, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:  # sends nothing
        probe.connect(place)
        return str(probe.getsockname()[0])
