"""A run folder has one owner; dead owners are recognised."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_dlm import entry
from megatron_dlm.errors import UserError
from megatron_dlm.training import run_lock
from megatron_dlm.training.run_lock import LOCK, owned_run_folder

HOLD = """
import sys, time
from megatron_dlm.training import run_lock
run_lock.TOUCH_SECONDS, run_lock.WATCH_SECONDS = 0.1, 3.0
with run_lock.owned_run_folder(sys.argv[1]):
    print("owned", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "TOUCH_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "WATCH_SECONDS", 1.0)
    monkeypatch.setattr(entry, "_warned", set())


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "owned\n"
    yield process
    process.kill()
    process.wait()


def _of_another_host(folder: Path, **changes: object) -> Path:
    file = folder / LOCK
    owner = {"host": "elsewhere", "boot": "1", "pid": 7, "process_start": "9", "since": "today"}
    file.write_text(json.dumps({**owner, **changes}))
    return file


@contextmanager
def _touched(file: Path) -> Iterator[None]:
    """Somebody shows signs of life of a lock's owner."""
    stop = threading.Event()

    def live() -> None:
        while not stop.wait(0.1):
            os.utime(file)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_second_process_is_refused_in_one_line(
    tmp_path: Path, owner: subprocess.Popen[str]
) -> None:
    with pytest.raises(UserError) as error, owned_run_folder(tmp_path):
        pass
    text = str(error.value)
    assert "\n" not in text
    assert f"process {owner.pid} on {socket.gethostname()} writes there since" in text
    assert (tmp_path / LOCK).is_file()


def test_a_killed_owner_is_recognised_and_said(
    tmp_path: Path, owner: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    owner.kill()  # and not waited for: what is left of it in the table of processes does not count
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
    with owned_run_folder(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert f"process {owner.pid} on {socket.gethostname()}, is dead" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_where_processes_are_numbered_alike_a_dead_owner_is_not_watched(
    tmp_path: Path, owner: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner.kill()
    owner.wait()
    watched: list[Path] = []
    monkeypatch.setattr(run_lock, "_is_touched", watched.append)
    with owned_run_folder(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert watched == []


def test_an_owner_in_another_container_is_watched(tmp_path: Path) -> None:
    me = {**run_lock._this_process(), "pid": 2**22 + 1, "pid_namespace": "pid:[1]"}
    file = _of_another_host(tmp_path, **me)
    with _touched(file), pytest.raises(UserError), owned_run_folder(tmp_path):
        pass


def test_a_dead_host_is_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _of_another_host(tmp_path)
    with owned_run_folder(tmp_path):
        pass
    assert "process 7 on elsewhere, is dead" in capsys.readouterr().err


def test_a_restarted_host_with_the_same_process_number_is_recognised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _of_another_host(tmp_path, host=socket.gethostname(), pid=os.getpid())
    with owned_run_folder(tmp_path):
        assert json.loads(file.read_text())["boot"] != "1"
    assert f"process {os.getpid()} on {socket.gethostname()}, is dead" in capsys.readouterr().err


def test_a_host_that_shows_signs_of_life_is_not_taken_over(tmp_path: Path) -> None:
    file = _of_another_host(tmp_path, job="123")
    with (
        _touched(file),
        pytest.raises(UserError, match="process 7 on elsewhere, job 123"),
        owned_run_folder(tmp_path),
    ):
        pass


def test_an_owner_shows_signs_of_life(tmp_path: Path) -> None:
    with owned_run_folder(tmp_path):
        before = (tmp_path / LOCK).stat().st_mtime_ns
        deadline = time.monotonic() + 30
        while (tmp_path / LOCK).stat().st_mtime_ns == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_an_owner_leaves_the_lock_of_another_alone(tmp_path: Path) -> None:
    with owned_run_folder(tmp_path):
        _of_another_host(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "elsewhere"


def test_one_of_many_gets_a_stale_lock(tmp_path: Path) -> None:
    _of_another_host(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    try:
        deadline = time.monotonic() + 120
        while sum(process.poll() is None for process in processes) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        (winner,) = [process for process in processes if process.poll() is None]
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == winner.pid
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"--save = .*file/run.*cannot be written"),
        owned_run_folder(tmp_path / "file" / "run"),
    ):
        pass


def test_without_a_run_folder_there_is_nothing_to_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with owned_run_folder(None):
        assert list(tmp_path.iterdir()) == []
