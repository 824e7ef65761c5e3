"""What entry points have in common: their place among the processes of a job, and how they fail.

Imports nothing heavy, so that a mistyped flag is reported before PyTorch is loaded.
"""

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import ParamSpec

from megatron_dlm.errors import UserError

P = ParamSpec("P")

USER_ERROR_STATUS = 2

REPORT_SECONDS = 20.0
"""How long other ranks stay for rank 0 to report; the launcher usually ends them much sooner."""


def world_size() -> int:
    """Number of processes, from torchrun's environment; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Global rank of this process, from torchrun's environment; 0 without it."""
    return int(os.environ.get("RANK", "0"))


_warned: set[str] = set()


def warn(text: str) -> None:
    """Tell the person watching of something that the run can go on with; once, on rank 0."""
    if rank() == 0 and text not in _warned:
        print(f"warning: {text}", file=sys.stderr, flush=True)
        _warned.add(text)


def report_user_errors(main: Callable[P, int]) -> Callable[P, int]:
    """Turn a `UserError` into one line on rank 0's standard error and exit status 2."""

    @functools.wraps(main)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            if rank() == 0:
                print(f"error: {error}", file=sys.stderr, flush=True)
            elif "TORCHELASTIC_RUN_ID" in os.environ:
                # torchrun ends all ranks as soon as one has ended. One that is faster than
                # rank 0 must not take the message with it.
                time.sleep(REPORT_SECONDS)
            return USER_ERROR_STATUS

    return wrapper
