"""How far a phase has come: one line that changes on a terminal, a line a minute elsewhere."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_dlm.activity import ACTIVITY, Activity
from megatron_dlm.terminal import is_live, say, show_status
from megatron_dlm.training.metrics import format_duration

LIVE_SECONDS = 0.5
"""Between two looks of a terminal's line."""

LINE_SECONDS = 60.0
"""Of a phase between two lines where there is no terminal."""


@contextmanager
def progress_display(shows: bool) -> Iterator[None]:
    """Show in the background what this process is doing.

    Args:
        shows: Whether this process is the one that speaks.
    """
    if not shows:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_show, args=(ended,), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _show(ended: threading.Event) -> None:
    live, told = is_live(), time.monotonic()
    while not ended.wait(LIVE_SECONDS):
        now = time.monotonic()
        if live:
            show_status(progress(ACTIVITY, now))
        elif now - max(told, ACTIVITY.entered) >= LINE_SECONDS:
            say(progress(ACTIVITY, now))
            told = now
    show_status("")


def progress(activity: Activity, now: float) -> str:
    """Phase, forward passes, their rate, time so far, and what is left if it is as the last one.

    Args:
        activity: Of the process.
        now: On the monotonic clock.
    """
    done, usual = activity.forwards, activity.usual.get(activity.phase, 0)
    seconds = max(now - activity.entered, 1e-9)
    known = usual > done > 0
    amount = f"{done} of about {usual}" if known else str(done)
    left = f", about {format_duration(seconds / done * (usual - done))} left" if known else ""
    return (
        f"{activity.phase}: {amount} forwards, {done / seconds:.1f}/s, "
        f"{format_duration(seconds)}{left}"
    )
