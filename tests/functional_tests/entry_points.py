"""Run the entry points: as functions or on forked ranks, which have imported everything, and as
processes where the process or its launcher is what is tested."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import pytest

from megatron_dlm.commands import main
from tests.distributed_tests.spawn import outside_world, run_distributed
from tests.faults.jobs import free_port
from tests.tiny import REPOSITORY

PRETRAIN = REPOSITORY / "pretrain_opdlm.py"
GENERATE = REPOSITORY / "tools" / "generate.py"
EVALUATE = REPOSITORY / "tools" / "evaluate.py"
CONVERT = REPOSITORY / "tools" / "convert_checkpoint.py"
PREPROCESS = REPOSITORY / "tools" / "preprocess_data.py"
CRITICAL_BATCH_SIZE = REPOSITORY / "tools" / "critical_batch_size.py"


@dataclass(frozen=True)
class Outcome:
    """How an entry point ended."""

    status: int
    stdout: str
    stderr: str

    def check_error(self, *fragments: str) -> None:
        """Assert one line of error with all fragments and a remedy, status 2, no work done.

        A run whose weights turn out to be broken has said what it was about to do.
        """
        lines = self.stderr.splitlines()
        assert len(lines) == 1, self.stderr
        assert lines[0].startswith("error: ")
        assert "; " in lines[0], "no remedy"
        for fragment in fragments:
            assert fragment in lines[0]
        assert self.status == 2
        begun = {line.split()[0] for line in self.stdout.splitlines()}
        assert begun <= {"model", "teacher", "data", "layout", "memory", "folder"}, self.stdout


Call = Callable[..., Outcome]


def caller(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """A function that runs `script` with arguments in this process."""

    def call(script: Path, *arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, captured.out, captured.err)

    return call


def run_process(
    script: Path,
    *arguments: object,
    processes: int | None = None,
    stdout: int | IO[Any] = subprocess.PIPE,
    **environment: str,
) -> Outcome:
    """Run a script as a process, or under torchrun with several."""
    command = [sys.executable]
    if processes is not None:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, str(script), *map(str, arguments)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            **environment,
        },
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=480,
        check=False,
    )
    return Outcome(done.returncode, done.stdout or "", done.stderr)


def command_on_rank(rank: int, processes: int, port: int, arguments: list[str]) -> Outcome:
    """A command on a rank of `run_distributed`, in the environment that torchrun gives."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with TemporaryFile("w+") as stdout, TemporaryFile("w+") as stderr:
        with outside_world(), redirect_stdout(stdout), redirect_stderr(stderr):
            status = main(arguments)
        printed = [file.seek(0) or file.read() for file in (stdout, stderr)]
    return Outcome(status, *printed)


def run_ranks(processes: int, *arguments: object) -> Outcome:
    """Run a command on forked ranks: the largest status, and what all of them printed."""
    words = list(map(str, arguments))
    of_ranks = run_distributed(
        command_on_rank, processes, processes, free_port(), words, timeout_seconds=500
    )
    return Outcome(
        max(outcome.status for outcome in of_ranks),
        "".join(outcome.stdout for outcome in of_ranks),
        "".join(outcome.stderr for outcome in of_ranks),
    )


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def options(files: Path, **changes: object) -> list[str]:
    """Arguments of a run that would work, with changes; None leaves a flag out."""
    values: dict[str, object] = {
        "load": files / "dense",
        "prompts": files / "prompts.jsonl",
        "num_rollouts": 1,
        "rollout_batch_size": 4,
        "global_batch_size": 4,
        "max_prompt_length": 128,
        "max_response_length": 8,
        "device": "cpu",
    }
    values |= changes
    return [
        part
        for name, value in values.items()
        if value is not None
        for part in ("--" + name.replace("_", "-"), str(value))
    ]
