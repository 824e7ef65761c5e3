"""What this process is doing, for whoever has to tell a busy one from one that stalls."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

START, SAVE = "start", "save"


class Activity:
    """The phase that a process is in, and when it last came forward in it.

    Attributes:
        phase: start, rollout, teacher, update or save.
        steps: Forward passes and changes of phase so far.
        since: When the last of them was, on the monotonic clock.
    """

    def __init__(self) -> None:
        self.phase, self.steps, self.since = START, 0, time.monotonic()

    def step(self) -> None:
        """Something has been done."""
        self.steps += 1
        self.since = time.monotonic()

    def enter(self, phase: str) -> None:
        """Another phase begins."""
        self.phase = phase
        self.step()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase within another one."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    @property
    def idle_seconds(self) -> float:
        """Since the last step."""
        return time.monotonic() - self.since


ACTIVITY = Activity()
"""That of this process."""
