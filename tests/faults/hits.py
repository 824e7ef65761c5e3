"""What is done to a job, again and again, and what has to come out of it."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dlm.config import Config
from tests.faults.jobs import (
    NUM_RANKS,
    Job,
    checkpoints,
    free_port,
    is_saving,
    job_config,
    wait_gone,
)
from tests.faults.runs import check_same, events, metrics
from tests.tiny import run_config, run_training

TARGETS = ("launcher", *map(str, range(NUM_RANKS)))
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

MOST_STARTS = 200

SETTLED = 60
"""Updates after which a rank has all that it will ever need."""


@dataclass
class Promise:
    """A promise, and how often it was put to the test.

    Attributes:
        name: Of the part of the harness.
        times: How often a job was hit.
        runs: Runs that were brought to their end and compared.
        broken: What went wrong, one entry a run.
        seconds: That it took.
        figures: What else was measured.
    """

    name: str
    times: int = 0
    runs: int = 0
    broken: list[str] = field(default_factory=list)
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)


def _repeat(
    name: str, folder: Path, times: int, one_run: Callable[[Promise, Path], None]
) -> Promise:
    """Hit run after run, until there were so many hits."""
    promise, started = Promise(name), time.monotonic()
    while promise.times < times and len(promise.broken) < 10:
        run = folder / f"{name}_{promise.runs}"
        try:
            one_run(promise, run)
            check_same(run, folder / "whole")
        except (AssertionError, subprocess.TimeoutExpired) as error:
            promise.broken.append(f"{run.name}: {error}")
        promise.runs += 1
        print(f"{run.name}: {promise.times} hits, {len(promise.broken)} broken", flush=True)
        shutil.rmtree(run, ignore_errors=True)
    promise.seconds = time.monotonic() - started
    return promise


def _at_a_random_moment(job: Job, run: Path, rng: random.Random) -> bool:
    """Wait for one: some time after the start, or while a checkpoint is written.

    Returns:
        Whether the job still runs.
    """
    if rng.random() < 0.3:
        try:
            job.wait_until(lambda: is_saving(run) or job.process.poll() is not None, 600)
        except AssertionError:
            return False
        return job.process.poll() is None
    # From the start of Python to the end of the run: most of it is training.
    saved, deadline = checkpoints(run), time.monotonic() + 600
    if rng.random() < 0.8:
        while checkpoints(run) == saved and job.process.poll() is None:
            assert time.monotonic() < deadline, job.output
            time.sleep(0.02)
    time.sleep(rng.uniform(0.0, 2.0))
    return job.process.poll() is None


def kills(folder: Path, times: int, rng: random.Random) -> Promise:
    """Kill a rank or the launcher; nothing is left of the job, and its command goes on."""

    def one_run(promise: Promise, run: Path) -> None:
        for _ in range(MOST_STARTS):
            job = Job(job_config(folder, run), run.with_suffix(".log"), restarts=0)
            if _at_a_random_moment(job, run, rng):
                ranks = list(job.ranks().values())
                promise.times += job.hit(rng.choice(TARGETS))
                wait_gone(ranks)
            if job.wait(600) == 0:
                return
        raise AssertionError(f"not finished after {MOST_STARTS} starts")

    return _repeat("kills", folder, times, one_run)


def restarts(folder: Path, times: int, rng: random.Random) -> Promise:
    """Kill ranks; torchrun starts them again, at the same port, and the job ends by itself."""

    def one_run(promise: Promise, run: Path) -> None:
        port = free_port() if rng.random() < 0.5 else None
        job = Job(job_config(folder, run), run.with_suffix(".log"), restarts=5, port=port)
        for _ in range(3):
            if _at_a_random_moment(job, run, rng):
                promise.times += job.hit(rng.choice(TARGETS[1:]))
                time.sleep(2.0)
        assert job.wait(600) == 0, job.output

    return _repeat("restarts", folder, times, one_run)


def signals(folder: Path, times: int, rng: random.Random) -> Promise:
    """Ask the launcher or a rank to stop, at any moment; the command goes on."""

    def one_run(promise: Promise, run: Path) -> None:
        for _ in range(MOST_STARTS):
            updates = len(metrics(run))
            job = Job(job_config(folder, run), run.with_suffix(".log"), restarts=0)
            if _at_a_random_moment(job, run, rng):
                trains = len(metrics(run)) > updates
                target = rng.choice(TARGETS)
                number = signal.SIGTERM if target == "launcher" else rng.choice(STOP_SIGNALS)
                is_hit = job.hit(target, number)
                promise.times += is_hit
                if is_hit and trains:
                    job.wait(600)
                    assert events(run)[-1] in ("stopped", "finished"), job.output
            if job.wait(600) == 0:
                return
        raise AssertionError(f"not finished after {MOST_STARTS} starts")

    return _repeat("signals", folder, times, one_run)


def _damage(file: Path, rng: random.Random) -> str:
    """Flip a bit of a file, cut it, or remove it."""
    content = bytearray(file.read_bytes())
    kind = rng.choice(("flip", "cut", "remove")) if content else "remove"
    if kind == "flip":
        position = rng.randrange(len(content))
        content[position] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    elif kind == "cut":
        os.truncate(file, rng.randrange(len(content)))
    else:
        file.unlink()
    return kind


def damages(folder: Path, times: int, rng: random.Random) -> Promise:
    """Damage a file of a checkpoint; the run goes on from one that is whole, to the same end.

    Runs in this process.
    """

    def config_of(run: Path) -> Config:
        return run_config(
            folder, folder / "dense", objective="sft", train_iters=5, save_interval=1, save=str(run)
        )

    promise, started = Promise("damages"), time.monotonic()
    whole = folder / "damages_whole"
    run_training(config_of(whole))
    for number in range(times):
        run = folder / f"damages_{number}"
        shutil.copytree(whole, run, symlinks=True)
        for last in (5, 4):  # the run died at update 3
            shutil.rmtree(run / f"iter_{last:07d}")
        (run / "latest_checkpointed_iteration.txt").write_text("3\n")
        files = sorted(path for path in run.rglob("iter_*/**/*") if path.is_file())
        file = rng.choice(files)
        kind = _damage(file, rng)
        promise.times += 1
        try:
            run_training(config_of(run))
            check_same(run, whole)
            promise.runs += 1
        except Exception as error:
            promise.broken.append(
                f"{kind} {file.relative_to(run)}: {type(error).__name__}: {error}"
            )
        shutil.rmtree(run)
    promise.seconds = time.monotonic() - started
    return promise


@dataclass
class _Usage:
    """Memory and handles of a rank, from the moment on that it has made `SETTLED` updates.

    Attributes:
        since: Updates of the run when the rank was first seen.
        bytes: Resident, at each look.
        handles: Open files and sockets, at each look.
    """

    since: int
    bytes: list[int] = field(default_factory=list)
    handles: list[int] = field(default_factory=list)


def _measure(process: int, usage: _Usage) -> None:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        handles = len(list(Path(f"/proc/{process}/fd").iterdir()))
    except OSError:
        return
    usage.bytes.append(pages * os.sysconf("SC_PAGE_SIZE"))
    usage.handles.append(handles)


def _soaked(
    promise: Promise,
    config: Config,
    log: Path,
    rng: random.Random,
    end: float,
    usages: dict[int, _Usage],
) -> None:
    """Start a run, and again until it has finished; hit it at random moments before `end`."""
    lines = Path(config.logging.save or "") / "metrics.jsonl"

    def updates() -> int:
        return lines.read_bytes().count(b"\n") if lines.exists() else 0

    for _ in range(MOST_STARTS):
        job = Job(config, log, restarts=3)
        # Some hits are during the start, the others some updates after the last one.
        is_early = rng.random() < 0.2
        moment = time.monotonic() + rng.uniform(0.0, 20.0)
        after = updates() + (0 if is_early else rng.randint(1, 200))
        while job.process.poll() is None:
            done = updates()
            for process in job.ranks().values():
                usage = usages.setdefault(process, _Usage(done))
                if done >= usage.since + SETTLED:
                    _measure(process, usage)
            if end > time.monotonic() > moment and done >= after:
                number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
                promise.times += job.hit(rng.choice(TARGETS), number)
                moment, after = time.monotonic() + 5.0, done + rng.randint(1, 200)
            time.sleep(1.0)
        if job.wait(600) == 0:
            return
    raise AssertionError(f"{lines.parent}: not finished after {MOST_STARTS} starts")


def soak(folder: Path, hours: float, rng: random.Random) -> Promise:
    """Hit one long run after the other for so many hours; watch memory and handles of ranks."""
    promise, started = Promise("soak"), time.monotonic()
    probe = job_config(folder, folder / "probe", updates=100, save_interval=20)
    assert Job(probe, folder / "probe.log", restarts=0).wait(3600) == 0
    per_update = (time.monotonic() - started) / 100
    updates = max(400, int(3600 * hours / 6 / per_update))
    whole, log = folder / "soak_whole", folder / "soak.log"
    reference = Job(job_config(folder, whole, updates, 20), folder / "soak_whole.log", restarts=0)
    begun, usages = time.monotonic(), dict[int, _Usage]()
    end = begun + 3600 * hours
    finished: list[Path] = []
    while time.monotonic() < end:
        run = folder / f"soak_{len(finished)}"
        _soaked(promise, job_config(folder, run, updates, 20), log, rng, end, usages)
        finished.append(run)
        minutes = (time.monotonic() - begun) / 60
        print(f"{run.name}: {promise.times} hits, {minutes:.0f} minutes", flush=True)
    promise.figures["updates"] = updates * len(finished)
    promise.figures["minutes"] = round((time.monotonic() - begun) / 60, 1)
    assert reference.wait(3600 * hours + 3600) == 0, reference.output[-2000:]
    for run in finished:
        promise.runs += 1
        try:
            check_same(run, whole)
        except AssertionError as error:
            promise.broken.append(f"{run.name}: {error}")
    for process, usage in usages.items():
        if len(usage.bytes) < 20:
            continue
        grown = max(usage.bytes) / usage.bytes[0]
        more = max(usage.handles) - usage.handles[0]
        promise.figures[str(process)] = {
            "seconds": len(usage.bytes),
            "memory_growth": round(grown, 3),
            "more_handles": more,
        }
        if grown > 1.2 or more > 8:
            promise.broken.append(f"process {process}: memory x {grown:.2f}, {more} more handles")
    promise.seconds = time.monotonic() - started
    return promise
