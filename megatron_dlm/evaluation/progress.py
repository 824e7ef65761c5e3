"""Lines of progress while responses are generated."""

import sys
import time

from megatron_dlm.training.metrics import format_duration
from megatron_dlm.types.trajectory import Trajectory


class GenerationProgress:
    """Prints the progress of a generation to standard error, at most one line per interval.

    Args:
        label: What is generated.
        total: Responses of this rank.
        enabled: Whether to print at all (rank 0).
        interval: Seconds between lines; work shorter than that prints nothing.
    """

    def __init__(self, label: str, total: int, *, enabled: bool, interval: float = 10.0) -> None:
        self._label = label
        self._total = total
        self._enabled = enabled
        self._interval = interval
        self._started = self._printed = time.perf_counter()
        self._responses = self._tokens = 0

    def __call__(self, trajectory: Trajectory) -> None:
        """Count a finished response."""
        self._responses += 1
        self._tokens += len(trajectory.response_ids)
        now = time.perf_counter()
        if not self._enabled or now - self._printed < self._interval:
            return
        self._printed = now
        elapsed = now - self._started
        left = elapsed / self._responses * (self._total - self._responses)
        print(
            f"{self._label} | {self._responses}/{self._total} responses of rank 0 "
            f"| {self._tokens / elapsed:,.0f} tok/s "
            f"| elapsed {format_duration(elapsed)} left {format_duration(left)}",
            file=sys.stderr,
            flush=True,
        )
