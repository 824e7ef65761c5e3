"""Lines of progress while responses are generated."""

import time

from megatron_dlm.terminal import format_duration, say
from megatron_dlm.types.trajectory import Trajectory


class GenerationProgress:
    """Prints the progress of a generation to standard error, at most one line per interval.

    Args:
        label: What is generated.
        total: Responses of this rank.
        enabled: Whether to say anything at all (rank 0).
        done: Responses, of all ranks, that an interrupted command left.
        interval: Seconds between lines; work shorter than that says nothing.
    """

    def __init__(
        self, label: str, total: int, *, enabled: bool, done: int = 0, interval: float = 10.0
    ) -> None:
        self._label = label
        self._total = total
        self._enabled = enabled
        self._interval = interval
        self._started = self._said = time.perf_counter()
        self._responses = self._tokens = 0
        if enabled and done:
            say(f"{label} | {done} responses are there already", error=True)

    def __call__(self, trajectory: Trajectory) -> None:
        """Count a finished response."""
        self._responses += 1
        self._tokens += len(trajectory.response_ids)
        now = time.perf_counter()
        if not self._enabled or now - self._said < self._interval:
            return
        self._said = now
        elapsed = now - self._started
        left = elapsed / self._responses * (self._total - self._responses)
        say(
            f"{self._label} | {self._responses}/{self._total} responses of rank 0 "
            f"| {self._tokens / elapsed:,.0f} tok/s "
            f"| elapsed {format_duration(elapsed)} left {format_duration(left)}",
            error=True,
        )
