"""What a signal does to a process that catches it, and what it does not."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from megatron_dlm.stop_request import (
    STOP_SIGNALS,
    TIME_IS_UP,
    StopRequest,
    reason,
)
from tests.tiny import REPOSITORY

AGAIN = """
import os, signal, sys, time
from megatron_dlm import stop_request
stop_request.REPEAT_SECONDS = 0.2
request = stop_request.StopRequest()
with request.catching_signals():
    for wait in (0, 0, 0.4):
        time.sleep(wait)
        print(request.code, flush=True)
        os.kill(os.getpid(), signal.SIGINT)
print("not reached")
"""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_wish_and_handlers_are_put_back(number: signal.Signals) -> None:
    request, before = StopRequest(), signal.getsignal(number)
    with request.catching_signals():
        assert request.code == 0
        os.kill(os.getpid(), number)
        assert request.code == number
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.code == number  # the first one counts
    assert signal.getsignal(number) == before
    assert reason(request.code) == number.name


def test_a_second_interrupt_ends_the_process_but_no_repetition_by_a_launcher() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", AGAIN],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.stdout.split() == ["0", "2", "2"]
    assert ended.returncode == -signal.SIGINT
    (line,) = ended.stderr.splitlines()
    assert line.startswith("SIGINT: the run saves and stops")


def test_time_is_a_reason_too() -> None:
    assert StopRequest(minutes=60).code == 0
    assert StopRequest(minutes=0).code == TIME_IS_UP
    assert reason(TIME_IS_UP) == "--exit-duration-in-mins"


def test_another_thread_leaves_the_handlers_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def look() -> None:
        with StopRequest().catching_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before]
