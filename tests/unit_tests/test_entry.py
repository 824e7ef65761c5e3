"""What the launcher says, and what it is told."""

import json
from pathlib import Path

import pytest

from megatron_dlm.entry import report_user_errors
from megatron_dlm.errors import bad_value


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
