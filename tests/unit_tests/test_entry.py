"""Numbers from the launcher, and errors reported to it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dlm.entry import report_user_errors
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.launcher import final_error
from tests.tiny import REPOSITORY


def _failing() -> int:
    raise bad_value("--lr", -1, "is negative", "choose 0 or more")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "x"),
        ("RANK", ""),
        ("RANK", "-1"),
        ("RANK", "1"),  # of one process
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "9" * 5000),
        ("LOCAL_RANK", "1.0"),
        ("LOCAL_RANK", "٣"),
    ],
)
def test_odd_numbers_of_the_launcher_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert report_user_errors(lambda: 0)() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {name} = ")
    assert len(line) < 600
    assert "torchrun" in line


def test_the_launcher_finds_the_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert report_user_errors(_failing)() == 2
    line = capsys.readouterr().err.strip()
    assert line == "error: --lr = -1: is negative; choose 0 or more"
    assert json.loads(file.read_text())["message"]["message"] == line


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int, int], Path]:
    """Put this process into a rank's place in an attempt of torchrun's; returns its error file."""

    def enter(attempt: int, local_rank: int) -> Path:
        file = tmp_path / "run" / f"attempt_{attempt}" / str(local_rank) / "error.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        return file

    return enter


def test_an_error_that_no_restart_changes_ends_all_later_attempts(
    attempts: Callable[[int, int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    attempts(0, 0)
    assert report_user_errors(_failing)() == 2
    line = capsys.readouterr().err.strip()
    for attempt in range(1, 12):
        attempts(attempt, attempt % 3)
        assert final_error() == (line, 2)
        assert report_user_errors(lambda: pytest.fail("works in vain"))() == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [None, "", "{}", '{"message": "Traceback"}', "[1]", '{"mess'])
def test_after_another_end_an_attempt_works(
    attempts: Callable[[int, int], Path], content: str | None
) -> None:
    file = attempts(0, 0)
    if content is not None:
        file.write_text(content)
    attempts(1, 0)
    assert report_user_errors(lambda: 0)() == 0


def test_an_error_stays_one_bearable_line() -> None:
    library = "unknown variant `" + "x" * 100_000 + "`\nat line 1"
    text = str(bad_value("--load", "folder", f"cannot be read ({library})", "give another folder"))
    assert "\n" not in text
    assert len(text) < 1500
    assert text.startswith("--load = 'folder': cannot be read (unknown variant `xxx")
    assert text.endswith("` at line 1); give another folder")
    assert len(str(UserError(library))) < 5000


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("x" * 3000, "File name too long; give a shorter path"),
        ("loop/config.json", "choose another path"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    path: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")

    def main() -> int:
        (tmp_path / path).stat()
        return 0

    assert report_user_errors(main)() == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {tmp_path}/")
    assert line in error


def test_a_missing_file_that_nobody_checked_for_is_a_defect(tmp_path: Path) -> None:
    def main() -> int:
        (tmp_path / "gone").stat()
        return 0

    with pytest.raises(FileNotFoundError):
        report_user_errors(main)()


PROGRAM = """
import atexit, sys, threading, time
from megatron_dlm.entry import run_as_process

class Freed:
    def __del__(self):
        sys.stderr.write("freed ")

def main():
    atexit.register(lambda: print("exit handler", end=" "))
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread", end=" "))).start()
    print("main", end=" ")
    END
    return 75

kept = Freed()
if __name__ == "__main__":
    run_as_process(main)
"""


def run_program(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_process_ends_as_usual_but_frees_nothing(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.replace("END", "pass"))
    assert run_program(str(script)) == (75, "main thread exit handler ", "")
    # In a program that runs it, and catches its end, that one decides.
    runs_it = (
        "import runpy\ntry:\n    runpy.run_path({!r}, run_name='__main__')\n"
        "except SystemExit as end:\n    print('ended with', end.code, end=' ')"
    )
    status, output, _ = run_program("-c", runs_it.format(str(script)))
    assert (status, output) == (0, "main ended with 75 thread exit handler ")
    definitions = PROGRAM.replace("END", "pass").partition("if __name__")[0]
    fails_later = "try:\n    run_as_process(main)\nexcept SystemExit:\n    raise ValueError('late')"
    script.write_text(definitions + fails_later)
    status, output, error = run_program(str(script))
    assert (status, output) == (1, "main thread exit handler ")
    assert "ValueError: late" in error


def test_a_process_that_raises_ends_as_usual(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.replace("END", "raise KeyError('defect')"))
    status, output, error = run_program(str(script))
    assert (status, output) == (1, "main thread exit handler ")
    assert "KeyError: 'defect'" in error
    assert "freed" in error
