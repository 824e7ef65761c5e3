"""Start runs as processes, wait for what they do, send them signals, compare what they leave."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from megatron_dlm.config import Config
from megatron_dlm.parallel import initialized
from megatron_dlm.training.run_folder import find_checkpoint
from tests.tiny import REPOSITORY


class RunningProcess:
    """A command in a session of its own, its output in a file.

    Args:
        command: Its words.
        log: File that its output is appended to.
        environment: Variables beside those of this process.
    """

    def __init__(self, command: Sequence[str | Path], log: Path, **environment: str) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*map(str, command)],
                cwd=REPOSITORY,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": str(REPOSITORY),
                    **environment,
                },
            )

    def wait_until(self, happened: Callable[[], bool], seconds: float = 400) -> None:
        """Wait for something that the command brings about, while it runs.

        Raises:
            AssertionError: It has ended before, or the time is over; with the output.
        """
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process, not to those that it has started."""
        self.process.send_signal(number)

    def wait(self, seconds: float = 120) -> int:
        """The exit status; what still runs after so many seconds is killed."""
        try:
            return self.process.wait(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    @property
    def output(self) -> str:
        """All that it has printed."""
        return self.log.read_text(errors="replace")


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without the times; none before the first update.

    A run that goes on may have written its last line in part.
    """
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    return [
        {key: value for key, value in json.loads(line).items() if key not in ("time", "throughput")}
        for line in lines
    ]


def events(run: Path) -> list[str]:
    """What the run's history says, oldest first."""
    lines = (run / "history.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line)["event"] for line in lines]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a run's newest checkpoint."""
    with initialized(Config.from_dict({"device": "cpu"})):
        nested = dist_checkpointing.load_plain_tensors(str(find_checkpoint(run)))
    flat: dict[str, torch.Tensor] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                walk(f"{prefix}.{key}", part)
        elif isinstance(value, torch.Tensor):
            flat[prefix] = value

    walk("", nested)
    assert any("exp_avg_sq" in name for name in flat)
    return flat


def check_same(run: Path, expected: Path) -> None:
    """Assert that two runs had the same updates and left the same tensors, bit for bit."""
    assert metrics(run) == metrics(expected)
    left, wanted = tensors(run), tensors(expected)
    assert left.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(left[name], tensor), name
