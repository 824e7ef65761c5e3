"""Limits of time and memory for a chat template, a program that came with a model."""

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SECONDS = 20
"""Seconds after which a template is considered endless."""

BYTES = 2 << 30
"""Memory that a template may take for one chat."""


class TemplateLimitError(Exception):
    """A template took too long."""


@contextmanager
def template_limits() -> Iterator[None]:
    """Limit time and memory of the rendering in the block.

    Time is limited only in the main thread, which receives the process's signals.

    Raises:
        TemplateLimitError: It took too long.
        MemoryError: It took too much memory.
    """
    with _limited_memory(), _limited_time():
        yield


@contextmanager
def _limited_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TemplateLimitError(f"it does not end within {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _limited_memory() -> Iterator[None]:
    try:
        pages = _pages()
    except (OSError, ValueError, IndexError):  # no Linux
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + BYTES
    for other in (soft, hard):
        if other != resource.RLIM_INFINITY:
            limit = min(limit, other)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _pages() -> int:
    """Pages of the process's address space. Read without a file object: once for every chat."""
    descriptor = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(descriptor, 100).split()[0])
    finally:
        os.close(descriptor)
