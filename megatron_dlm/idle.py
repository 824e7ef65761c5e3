"""How long this process waits for the neighbouring stages of its pipeline."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_dlm import platform


class NeighbourWaits:
    """Seconds in which this process had nothing to compute because a neighbour had not sent.

    On CUDA the host goes on and the device waits: two events around each wait tell how long.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around whatever ends when a neighbour's message is there."""
        if platform.is_cuda():
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
            return
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    def take(self) -> float:
        """Seconds since the last call; on CUDA after a wait for the device."""
        if self._events:
            platform.synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


NEIGHBOURS = NeighbourWaits()
"""Those of this process."""
