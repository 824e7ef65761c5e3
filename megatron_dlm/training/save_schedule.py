"""When a checkpoint is due."""

import time


class SaveSchedule:
    """Counts updates and minutes since the last checkpoint.

    Args:
        interval: Updates between checkpoints, rounded up to the end of a rollout; 0: never so.
        minutes: Between checkpoints, rounded up to the next update or end of a rollout; 0: never.
        iteration: Updates done at the start.
    """

    def __init__(self, interval: int, minutes: float, iteration: int) -> None:
        self._interval = interval
        self._seconds = 60 * minutes
        self.saved(iteration)

    def saved(self, iteration: int) -> None:
        """A checkpoint was written."""
        self._iteration, self._time = iteration, time.monotonic()

    def is_due(self, iteration: int, *, ends_rollout: bool) -> bool:
        """Whether one is due after so many updates; clocks of ranks may differ."""
        passed = self._interval and iteration // self._interval > self._iteration // self._interval
        waited = self._seconds and time.monotonic() - self._time >= self._seconds
        return bool(waited or (ends_rollout and passed))
