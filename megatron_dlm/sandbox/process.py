"""Run Python programs in the sandbox, several at once, under limits."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

LAUNCHER = Path(__file__).with_name("launcher.py")

End = Literal["exit", "signal", "time", "memory", "processes", "output", "stopped"]
"""How a program ended: by itself, by a signal, by one of its limits, or because it was of no more
use."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        cpu_seconds: Processor time of one process.
        wall_seconds: Time from start to end.
        memory_bytes: Address space of one process, and resident memory of all together.
        processes: Processes and threads at a time.
        disk_bytes: Files in its folder, which is in memory.
        output_bytes: Of standard output, and of standard error.
    """

    cpu_seconds: int = 10
    wall_seconds: float = 30.0
    memory_bytes: int = 1 << 30
    processes: int = 16
    disk_bytes: int = 64 << 20
    output_bytes: int = 4 << 20


@dataclass(frozen=True)
class Program:
    """A Python program.

    Attributes:
        files: Text of the files in its folder, by name.
        arguments: Of the interpreter: a file, and what that takes.
        stdin: Its standard input.
        channels: Open file descriptors that it inherits, under the same numbers.
    """

    files: Mapping[str, str]
    arguments: Sequence[str]
    stdin: str = ""
    channels: Sequence[int] = ()

    @classmethod
    def of(cls, source: str, stdin: str = "") -> Program:
        """A program of one file."""
        return cls({"program.py": source}, ["program.py"], stdin)


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        end: How it ended.
        code: Its exit status, where it ended by itself; the negative number of a signal; else None.
        stdout: What it wrote, up to the limit.
        stderr: The same.
    """

    end: End
    code: int | None
    stdout: bytes
    stderr: bytes


class SandboxFailed(Exception):
    """The sandbox could not be set up; says what the system refused."""


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    status: int
    texts: dict[int, bytearray] = field(default_factory=dict)


def run_programs(
    programs: Sequence[Program], limits: Limits, *, isolated: bool, until: int = 0
) -> list[Outcome]:
    """Run programs that work together, each in a sandbox of its own, until one of them ends.

    Args:
        programs: What to run at the same time. Their channels are closed here.
        limits: Of each.
        isolated: Whether namespaces separate them from the machine and from each other.
        until: Which of them decides; the others are stopped when it has ended.

    Returns:
        What became of each.

    Raises:
        SandboxFailed: One could not be started.
    """
    running: list[_Running] = []
    folder = None if isolated else tempfile.mkdtemp(prefix="unsafe-code-")
    selector = selectors.DefaultSelector()
    ends: dict[int, End] = {}
    try:
        for program in programs:
            running.append(_start(program, limits, folder))
        _close(programs)  # a program learns that another has ended only if nobody else holds on
        for index, run in enumerate(running):
            assert run.process.stdout is not None
            assert run.process.stderr is not None
            for pipe in (run.process.stdout.fileno(), run.process.stderr.fileno(), run.status):
                run.texts[pipe] = bytearray()
                selector.register(pipe, selectors.EVENT_READ, index)
        deadline = time.monotonic() + limits.wall_seconds
        decided = running[until]
        open_pipes = set(decided.texts)
        while open_pipes:
            left = deadline - time.monotonic()
            if left <= 0:
                ends[until] = "time"
                break
            for key, _ in selector.select(left):
                index, pipe = int(key.data), key.fd
                text = running[index].texts[pipe]
                chunk = os.read(pipe, 1 << 16)
                if not chunk:
                    selector.unregister(pipe)
                    open_pipes.discard(pipe)
                text += chunk
                if len(text) > limits.output_bytes:
                    ends.setdefault(index, "output")
                    _kill(running[index].process)
            if ends.get(until) == "output":
                break
    finally:
        for run in running:
            _kill(run.process)
        selector.close()
        if len(running) < len(programs):
            _close(programs)
        for run in running:
            os.close(run.status)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return [_outcome(run, ends.get(index), limits) for index, run in enumerate(running)]


def _close(programs: Sequence[Program]) -> None:
    for program in programs:
        for channel in program.channels:
            os.close(channel)


def _start(program: Program, limits: Limits, folder: str | None) -> _Running:
    reading, writing = os.pipe()
    python = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    job = {
        "files": dict(program.files),
        "arguments": list(program.arguments),
        "stdin": program.stdin,
        "limits": asdict(limits),
        "folder": folder,
        "python": str(python),
        "prefixes": sorted({sys.base_prefix, sys.base_exec_prefix}),
    }
    try:
        process = subprocess.Popen(
            [str(python), "-s", "-P", str(LAUNCHER), str(writing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[writing, *program.channels],
            start_new_session=True,
            env={"PATH": os.defpath, "LANG": "C.UTF-8"},
            cwd="/",
        )
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(job).encode())
        process.stdin.close()
    return _Running(process, reading)


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _outcome(run: _Running, end: End | None, limits: Limits) -> Outcome:
    assert run.process.stdout is not None
    assert run.process.stderr is not None
    stdout, stderr = (
        bytes(run.texts[pipe.fileno()][: limits.output_bytes])
        for pipe in (run.process.stdout, run.process.stderr)
    )
    run.process.stdout.close()
    run.process.stderr.close()
    report = bytes(run.texts[run.status])
    said = json.loads(report) if report else {}
    if "failure" in said:
        raise SandboxFailed(said["failure"])
    code = said.get("code")
    if end is None and "excess" in said:
        end = said["excess"]
    if end is None and code is None:
        end = "stopped"
    if end is None:
        end = "signal" if code is not None and code < 0 else "exit"
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            end = "time"
    return Outcome(end, code, stdout, stderr)
