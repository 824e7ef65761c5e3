"""A small job of two ranks under torchrun, and how it is hit."""

import contextlib
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

from megatron_dlm.config import Config
from tests.faults.runs import RunningProcess
from tests.tiny import run_config, save_random_model, write_data

NUM_RANKS = 2

GONE_SECONDS = 30.0
"""Within which no rank is left after one of them, or the launcher, was killed."""


def prepare(folder: Path) -> None:
    """Write the model and the data that jobs use."""
    write_data(folder)
    save_random_model(folder / "dense")


def job_config(folder: Path, run: Path, updates: int = 24, save_interval: int = 4) -> Config:
    """A run of so many updates, with a checkpoint after every few of them."""
    return run_config(
        folder,
        folder / "dense",
        objective="sft",
        train_iters=updates,
        save_interval=save_interval,
        keep_checkpoints=3,
        log_interval=1,
        save=str(run),
    )


def free_port() -> int:
    """A port that nobody listens at, and below those that the system gives to who asks for any."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


class Job(RunningProcess):
    """The training of a configuration, started with torchrun.

    Args:
        config: Of the run.
        log: File that its output is appended to.
        restarts: How often torchrun starts the ranks again.
        port: Of the rendezvous, at this host; None: torchrun finds one by itself.
    """

    def __init__(self, config: Config, log: Path, restarts: int, port: int | None = None) -> None:
        file = log.with_suffix(".yaml")
        file.write_text(config.to_yaml())
        place = ["--standalone"]
        if port is not None:
            place = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        command = [sys.executable, "-m", "torch.distributed.run", *place]
        command += ["--nproc-per-node", str(NUM_RANKS), "--max-restarts", str(restarts)]
        super().__init__([*command, "-m", "megatron_dlm", "train", "--config", str(file)], log)

    def ranks(self) -> dict[int, int]:
        """Processes of the ranks that live, by rank."""
        return ranks_of(self.process.pid)

    def hit(self, target: str, number: signal.Signals = signal.SIGKILL) -> bool:
        """Send a signal to the launcher or to a rank ("launcher", "0", "1"); whether it was there.

        The children of a launcher that is killed have to be gone soon.
        """
        ranks = self.ranks()
        process = self.process.pid if target == "launcher" else ranks.get(int(target))
        if process is None or self.process.poll() is not None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
        if number == signal.SIGKILL and target == "launcher":
            wait_gone(list(ranks.values()))
        return True


def ranks_of(launcher: int) -> dict[int, int]:
    """Processes of the ranks that live below a launcher, by rank."""
    found = {}
    below = _children(launcher)
    while below:
        child = below.pop()
        with contextlib.suppress(OSError):
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            of_rank = [v for v in variables if v.startswith(b"RANK=")]
            if of_rank:
                found[int(of_rank[0][5:])] = child
            else:
                below += _children(child)
    return found


def wait_gone(processes: list[int]) -> float:
    """Wait until none of the processes is left; returns the seconds.

    Raises:
        AssertionError: Some are after `GONE_SECONDS`.
    """
    started = time.monotonic()
    while left := [process for process in processes if is_running(process)]:
        assert time.monotonic() - started < GONE_SECONDS, f"processes {left} are left"
        time.sleep(0.05)
    return time.monotonic() - started


def is_running(process: int) -> bool:
    """Whether a process exists and is not only waiting to be forgotten."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _children(process: int) -> list[int]:
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def checkpoints(run: Path) -> int:
    """The newest iteration that a run has published; 0 before the first."""
    names = [path.name for path in run.glob("iter_*") if path.suffix == ""]
    return max((int(name.removeprefix("iter_")) for name in names), default=0)


def is_saving(run: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(run.glob("iter_*.tmp"))
