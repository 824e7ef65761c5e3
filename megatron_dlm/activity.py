"""What this process is doing, for whoever has to tell a busy one from one that stalls."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

START, SAVE = "start", "save"


class Activity:
    """The phase that a process is in, and when it last came forward in it.

    Attributes:
        phase: start, rollout, teacher, update, evaluation or save.
        steps: Forward passes and changes of phase so far.
        since: When the last of them was, on the monotonic clock.
        entered: When the phase began, likewise.
        forwards: Forward passes in this phase so far.
        usual: Forward passes of the last such phase that is over, by phase.
    """

    def __init__(self) -> None:
        self.phase, self.steps, self.since = START, 0, time.monotonic()
        self.entered, self.forwards = self.since, 0
        self.usual: dict[str, int] = {}

    def step(self) -> None:
        """Something has been done."""
        self.steps += 1
        self.forwards += 1
        self.since = time.monotonic()

    def enter(self, phase: str) -> None:
        """Another phase begins."""
        self.usual[self.phase] = self.forwards
        self.phase = phase
        self.step()
        self.entered, self.forwards = self.since, 0

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
