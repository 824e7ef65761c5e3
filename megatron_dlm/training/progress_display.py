"""How far a phase has come: one line that changes on a terminal, a line a minute elsewhere."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_dlm.activity import ACTIVITY, Activity
from megatron_dlm.terminal import format_duration, is_live, say, show_status

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
    """Phase, what of it is done, forward passes, their rate, time so far, and what is left.

    What is left is measured by the forward passes of the last such phase; where there was none, or
    this one takes longer, by what is done of work of known size.

    Args:
        activity: Of the process.
        now: On the monotonic clock.
    """
    forwards, seconds = activity.forwards, max(now - activity.entered, 1e-9)
    work, usual = activity.work, activity.usual.get(activity.phase, 0)
    rate = forwards / seconds
    if work is not None:  # a start has read files and loaded models before
        rate = (forwards - work.forwards) / max(now - work.since, 1e-9)
    parts, left = [], None
    if work is not None and work.total:
        parts.append(f"{work.done:,} of {work.total:,} {work.unit}")
        if 0 < work.done < work.total:
            left = (now - work.since) / work.done * (work.total - work.done)
    if usual > forwards > 0:
        left = seconds / forwards * (usual - forwards)
        parts.append(f"{forwards:,} of about {usual:,} forwards, {rate:.1f}/s")
    elif forwards:
        unit = "forward" if forwards == 1 else "forwards"
        parts.append(f"{forwards:,} {unit}, {rate:.1f}/s")
    parts.append(format_duration(seconds))
    if left is not None:
        parts.append(f"about {format_duration(left)} left")
    return f"{activity.phase}: {', '.join(parts)}"
