"""The history of a run can be added to and read, whatever has become of the file."""

import importlib.metadata
import json
import math
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

import megatron_dlm
from megatron_dlm import entry
from megatron_dlm.training import run_history
from megatron_dlm.training.run_history import HISTORY, events, last_event, record


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "_warned", set())


def test_events_are_read_in_order(tmp_path: Path) -> None:
    assert (events(tmp_path), last_event(tmp_path)) == ([], None)
    record(tmp_path, "started", iteration=0, rollout=0, load="models/a b", differences={})
    record(tmp_path, "diverged", iteration=7, rollout=3, loss=math.nan, path=tmp_path)
    started, diverged = events(tmp_path)
    assert (started["event"], started["load"], started["iteration"]) == ("started", "models/a b", 0)
    assert (diverged["event"], diverged["iteration"], diverged["rollout"]) == ("diverged", 7, 3)
    assert (diverged["loss"], diverged["path"]) == ("nan", str(tmp_path))
    assert last_event(tmp_path) == diverged
    assert datetime.fromisoformat(started["time"]).utcoffset() is not None
    # Any JSON parser reads it: Python's own would take NaN.
    for line in (tmp_path / HISTORY).read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_start_says_what_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4242")
    monkeypatch.setenv("WANDB_API_KEY", "a secret")
    record(tmp_path, "started", iteration=0, rollout=0)
    record(tmp_path, "finished", iteration=2, rollout=1)
    started, finished = events(tmp_path)
    assert started["version"] == megatron_dlm.__version__
    environment = started["environment"]
    for package in ("torch", "megatron-core", "transformers"):
        assert environment[package] == importlib.metadata.version(package)
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (environment["SLURM_JOB_ID"], environment["world_size"]) == ("4242", 1)
    assert shlex.split(started["command"]) == sys.orig_argv
    assert "a secret" not in (tmp_path / HISTORY).read_text()
    assert "command" not in finished


def test_commit_of_a_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    checkout = run_history._checkout.__wrapped__
    assert checkout(tmp_path) == (None, None)
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "feat: one")
    (tmp_path / "untracked").write_text("1")
    assert checkout(tmp_path) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "file").write_text("2")
    assert checkout(tmp_path) == (git("rev-parse", "HEAD"), True)


def test_line_of_a_killed_writer_costs_only_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, "stopped", iteration=1, rollout=1)
    with (tmp_path / HISTORY).open("a") as file:
        file.write('{"event": "resu')
    record(tmp_path, "finished", iteration=2, rollout=2)
    assert [found["event"] for found in events(tmp_path)] == ["stopped", "finished"]
    assert f"{HISTORY}:2 cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("line", [b"[]", b'{"event": 3}', b"\xff\xfe", b"[" * 100_000])
def test_odd_lines_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes
) -> None:
    (tmp_path / HISTORY).write_bytes(line + b"\n\n")
    record(tmp_path, "finished", iteration=2, rollout=2)
    assert [found["event"] for found in events(tmp_path)] == ["finished"]
    assert f"{HISTORY}:1 cannot be read" in capsys.readouterr().err


def test_only_rank_zero_of_a_run_with_a_folder_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record(None, "finished", iteration=1, rollout=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    record(tmp_path, "finished", iteration=1, rollout=1)
    assert not (tmp_path / HISTORY).exists()
    monkeypatch.setenv("RANK", "0")
    record(tmp_path / "gone", "finished", iteration=1, rollout=1)
    assert "no record of 'finished'" in capsys.readouterr().err
