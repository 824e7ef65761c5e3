"""What this process is doing, for whoever has to tell a busy one from one that stalls."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

START, SAVE = "start", "save"


@dataclass
class Work:
    """Work of known size, of this process.

    Attributes:
        unit: Name of what is counted.
        total: How many there are.
        done: How many of them are finished.
        since: When it began, on the monotonic clock.
        forwards: Forward passes of the phase before it.
    """

    unit: str
    total: int
    done: int = 0
    since: float = field(default_factory=time.monotonic)
    forwards: int = 0


class Activity:
    """The phase that a process is in, and when it last came forward in it.

    Attributes:
        phase: start, rollout, teacher, update, evaluation or save.
        steps: Forward passes and changes of phase so far.
        since: When the last of them was, on the monotonic clock.
        entered: When the phase began, likewise.
        forwards: Forward passes in this phase so far.
        usual: Forward passes of the last such phase that is over, by phase.
        work: What is being worked through in this phase, if that is known: its unit, how many are
            done and how many there are.
    """

    def __init__(self) -> None:
        self.phase, self.steps, self.since = START, 0, time.monotonic()
        self.entered, self.forwards = self.since, 0
        self.usual: dict[str, int] = {}
        self.work: Work | None = None

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
        self.entered, self.forwards, self.work = self.since, 0, None

    @contextmanager
    def working(self, unit: str, total: int) -> Iterator["Work"]:
        """Around work of known size, which is to be counted in `Work.done`; the innermost counts.

        Args:
            unit: Its name, as a plural.
            total: How many there are.
        """
        outer, self.work = self.work, Work(unit, total, forwards=self.forwards)
        try:
            yield self.work
        finally:
            self.work = outer

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
