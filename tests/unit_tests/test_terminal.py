"""Standard output that cannot take what is said: real pipes, /dev/full, an ASCII terminal."""

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import REPOSITORY

SAYS = r"""
import sys
from pathlib import Path
from megatron_dlm.entry import report_user_errors
from megatron_dlm.terminal import say, say_table, write_results
from rich.table import Table

@report_user_errors
def main():
    table = Table("gr\u00f6\u00dfe")
    table.add_row("2 \u00b5m")
    for _ in range(3):
        say("gr\u00f6\u00dfer \ud83d")
        say_table(table)
    {more}
    Path(sys.argv[1]).write_text("done")
    return 0

sys.exit(main())
"""


def run(tmp_path: Path, stdout: Any, more: str = "pass", **environment: str) -> tuple[int, str]:
    """Exit status and standard error of a process that says things and then writes a file."""
    done = subprocess.run(
        [sys.executable, "-c", SAYS.format(more=more), str(tmp_path / "file")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.fixture
def left_pipe() -> Any:
    """A pipe whose reader has left, as that of `| head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("more", ["pass", "write_results('{}\\n')"])
def test_a_reader_that_left_ends_nothing(tmp_path: Path, left_pipe: int, more: str) -> None:
    assert run(tmp_path, left_pipe, more) == (0, "")
    assert (tmp_path / "file").read_text() == "done"


def test_a_full_disk_ends_what_it_was_to_take(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        assert run(tmp_path, full) == (0, "")
        assert (tmp_path / "file").read_text() == "done"
        (tmp_path / "file").unlink()
        # Also behind lines that could not be shown, results that cannot be written are an error.
        status, error = run(tmp_path, full, "write_results('{}\\n')")
    assert (status, (tmp_path / "file").exists()) == (2, False)
    problem = "error: standard output cannot be written (No space left on device); "
    assert error == problem + "make room there, or send it elsewhere\n"


def test_an_ascii_terminal_is_shown_escapes(tmp_path: Path) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    with (tmp_path / "shown").open("wb") as stdout:
        assert run(tmp_path, stdout, **ascii_only) == (0, "")
    shown = (tmp_path / "shown").read_bytes()
    assert shown.isascii()
    assert shown.count(b"gr\\xf6\\xdfer \\ud83d") == 3
    assert shown.count(b"2 \\xb5m") == 3
    assert (tmp_path / "file").read_text() == "done"


STATUS = """
from megatron_dlm.terminal import say, show_status
show_status("{long}")
say("a line")
show_status("second")
show_status("third")
show_status("")
say("end")
"""


def test_a_status_is_one_line_that_lines_take_the_place_of() -> None:
    reader, writer = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "40", "TERM": "xterm"}
    command = [sys.executable, "-c", STATUS.format(long="x" * 90)]
    for target in (writer, subprocess.PIPE):
        done = subprocess.run(command, env=environment, stdout=target, text=True, check=True)
    shown = os.read(reader, 4096).decode().split("\r\x1b[K")
    assert shown == ["", "x" * 39, "a line\r\n", "second", "third", "end\r\n"]
    assert done.stdout == "a line\nend\n"
    os.close(reader)
    os.close(writer)
