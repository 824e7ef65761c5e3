"""Common parts of entry points: rank and number of processes, and reports of errors.

Imports nothing slow, so that a mistyped flag is reported before PyTorch is loaded.
"""

import atexit
import errno
import functools
import gc
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn, ParamSpec

from megatron_dlm.errors import TrainingDiverged, UserError, bad_value
from megatron_dlm.launcher import die_with_launcher, final_error, leave_error, leave_status
from megatron_dlm.terminal import end_standard_output, escape_unknown_characters, say

P = ParamSpec("P")

_USUAL_THRESHOLDS = gc.get_threshold()

USER_ERROR_STATUS = 2

DIVERGED_STATUS = 3
"""Of a run whose loss or gradient is no number any more: the same command ends the same way."""

PREEMPTED_STATUS = 75
"""Of a run that was asked to stop and has saved: the same command goes on (BSD's EX_TEMPFAIL)."""

REPORT_SECONDS = 20.0
"""Seconds that other ranks wait for rank 0 to report; the launcher usually ends them sooner."""


_REMEDIES = {
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EACCES: "give this user the right to it, or choose another path",
    errno.EPERM: "give this user the right to it, or choose another path",
    errno.EROFS: "choose a path that can be written",
    errno.ENOSPC: "make room there, or choose another path",
    errno.EDQUOT: "make room there, or choose another path",
    errno.ELOOP: "the symbolic link leads to itself: choose another path",
}
"""What to do where the system refuses a file, whichever step of a command met it."""


def collect_garbage_rarely() -> None:
    """Let Python look for garbage less often, until `collect_garbage_as_usual`.

    Ten thousands of objects come with imports and stay: looking through them each time some are
    added takes a tenth of a start.
    """
    gc.set_threshold(100_000, 50, 100)


def collect_garbage_as_usual() -> None:
    """From here on, what comes can hold tensors."""
    gc.set_threshold(*_USUAL_THRESHOLDS)


def world_size() -> int:
    """Number of processes, from torchrun's environment; 1 without it."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Global rank of this process, from torchrun's environment; 0 without it."""
    return _number("RANK", 0)


def local_rank() -> int:
    """Rank of this process on its node, from torchrun's environment; 0 without it."""
    return _number("LOCAL_RANK", 0)


def _number(name: str, default: int) -> int:
    """A number that the launcher put into the environment.

    Raises:
        UserError: It is not a number, or out of range.
    """
    text = os.environ.get(name)
    if text is None:
        return default
    is_number = text.isascii() and text.isdecimal() and len(text) < 10
    if not is_number or int(text) < (name == "WORLD_SIZE"):
        raise bad_value(name, text, "is no valid number", "start with torchrun, or unset it")
    return int(text)


def check_launch() -> None:
    """Check that the launcher's numbers fit each other.

    Raises:
        UserError: One is no number, or a rank is not below the number of processes.
    """
    for name, value in (("RANK", rank()), ("LOCAL_RANK", local_rank())):
        if value >= world_size():
            raise bad_value(
                name,
                value,
                f"is not below WORLD_SIZE = {world_size()}",
                "start with torchrun, or unset both",
            )


_warned: set[str] = set()


def warn(text: str) -> None:
    """Print a warning once, on rank 0."""
    if rank() == 0 and text not in _warned:
        say(f"warning: {text}", error=True)
        _warned.add(text)


def _reports() -> bool:
    """Whether this process reports an error: rank 0, or one whose rank is invalid."""
    try:
        return not 0 < rank() < world_size()
    except UserError:
        return True


def _of_a_file(error: OSError) -> UserError | None:
    """What the system refused to do with a file that somebody named; None for a defect of ours."""
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None or error.filename is None:
        return None
    return UserError(f"{error.filename}: {error.strerror}; {remedy}")


def report_user_errors(main: Callable[P, int]) -> Callable[P, int]:
    """Turn a `UserError` into one line on rank 0's standard error and an exit status.

    The status is `DIVERGED_STATUS` for a run that diverged, else `USER_ERROR_STATUS`. An operation
    on a file that the system refuses is treated the same way.
    """

    @functools.wraps(main)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> int:
        escape_unknown_characters()
        try:
            check_launch()
            die_with_launcher()
            ended = final_error()
            if ended is not None:  # said when it happened; no restart changes it
                leave_status(ended[1])
                leave_error(*ended)
                return ended[1]
            status = main(*args, **kwargs)
            leave_status(status)
            if status:
                leave_error(f"ended with status {status}", status)
            return status
        except (UserError, OSError) as caught:
            error = caught if isinstance(caught, UserError) else _of_a_file(caught)
            if error is None:
                raise
            diverged = isinstance(error, TrainingDiverged)
            status = DIVERGED_STATUS if diverged else USER_ERROR_STATUS
            leave_status(status)
            leave_error(f"error: {error}", status)
            if _reports():
                say(f"error: {error}", error=True)
            elif "TORCHELASTIC_RUN_ID" in os.environ:
                # torchrun ends all ranks as soon as one has ended. One that is faster than rank 0
                # must not take the message with it.
                time.sleep(REPORT_SECONDS)
            return status
        finally:
            end_standard_output()

    return wrapper


def run_as_process(main: Callable[[], int]) -> NoReturn:
    """Run a program's main function as the last it does, and end with the status that it returns.

    What is left is not freed object by object, for which Python takes seconds after models and
    libraries: the system takes memory back as a whole. Before that threads are waited for, and what
    `atexit` was told in between is called. A process that used CUDA ends as usual, for the sake of
    profilers and drivers.

    Raises:
        SystemExit: With the status.
    """
    returned: list[int] = []
    program = sys.modules["__main__"]

    def end() -> None:
        # Where another program has run this one as a part of it, that goes on, and has its own end.
        is_own = sys.modules.get("__main__") is program and not hasattr(sys, "last_value")
        if returned and is_own and not _used_cuda():
            logging.shutdown()  # `atexit` was told of it before, and would call it later
            if sys.stdout is not None:
                end_standard_output()
            if sys.stderr is not None:
                sys.stderr.flush()
            os._exit(returned[0])

    atexit.register(end)  # what is registered first is called last
    returned.append(main())
    sys.exit(returned[0])


def _used_cuda() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()
