"""The wish to end a run early: a signal sets it, or a time limit.

A signal handler does nothing but set the wish. The run sees it between two forwards of a rollout or
of a teacher and after each update (`stop_agreement`), saves, and ends with `PREEMPTED_STATUS`.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from megatron_dlm.entry import rank

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

REPEAT_SECONDS = 3.0
"""A second SIGINT ends the process at once, but not within so many seconds: a launcher may pass on
the one that the terminal has sent to all processes."""

TIME_IS_UP = 1000
"""In the place of a signal's number, where `--exit-duration-in-mins` has passed."""


class StopRequested(Exception):
    """Unwinds a rollout or a teacher's phase, on all ranks that run in step.

    Attributes:
        code: Number of the signal, or `TIME_IS_UP`.
    """

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(reason(code))


def reason(code: int) -> str:
    """What made a run stop, in words."""
    return "--exit-duration-in-mins" if code == TIME_IS_UP else signal.Signals(code).name


class StopRequest:
    """The wish of this process.

    Args:
        minutes: From now until the run is to stop by itself; None for no limit.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._signal = 0
        self._interrupted_at = 0.0

    @property
    def code(self) -> int:
        """Number of the signal, or `TIME_IS_UP`; 0 while nothing asks to stop."""
        if self._signal:
            return self._signal
        is_late = self._deadline is not None and time.monotonic() >= self._deadline
        return TIME_IS_UP if is_late else 0

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Have `STOP_SIGNALS` set the wish; the handlers before are put back on exit.

        Python handles signals in its main thread: in another one nothing is changed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._signal:
            self._signal = number
            # Not `print`, which cannot be entered twice.
            again = ", a second one ends it at once" if number == signal.SIGINT else ""
            name = signal.Signals(number).name
            text = f"{name}: the run saves and stops after this update or forward{again}\n"
            if rank() == 0:
                with suppress(OSError):  # nobody reads standard error any more
                    os.write(2, text.encode())
        if number != signal.SIGINT:
            return
        if self._interrupted_at and now - self._interrupted_at > REPEAT_SECONDS:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self._interrupted_at = self._interrupted_at or now
