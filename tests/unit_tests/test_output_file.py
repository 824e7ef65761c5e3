"""Files that commands write, on a real file system that refuses, fills up or is left by a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dlm.errors import UserError
from megatron_dlm.output_file import (
    check_output_file,
    check_output_folder,
    check_space,
    replaced_file,
    write_file,
)
from tests.limits import largest_file
from tests.refusal import refusal
from tests.tiny import REPOSITORY


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    write_file(file, "old")
    file.chmod(0o640)
    write_file(file, "neu: ü")
    assert file.read_bytes() == "neu: ü".encode()
    assert file.stat().st_mode & 0o777 == 0o640
    assert names(tmp_path) == ["results.json"]


def test_of_a_link_what_it_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "results.json"
    link.symlink_to(tmp_path / "disk" / "of_today.json")
    for content in ("first", "second"):
        write_file(link, content)
        assert link.is_symlink()
        assert (tmp_path / "disk" / "of_today.json").read_text() == content


def test_a_refused_write_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text("old")
    with (
        largest_file(1000),
        pytest.raises(
            UserError, match=r"^--output = .*results.json': cannot be written \(File too large\); "
        ),
    ):
        write_file(file, "x" * 1001, "--output")
    with pytest.raises(ZeroDivisionError), replaced_file(file) as temporary:
        temporary.write_text(f"half of it {1 / 0}")
    assert file.read_text() == "old"
    assert names(tmp_path) == ["results.json"]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        file = tmp_path / "results.json"
        write_file(file, "x" * 20_000)
        with pytest.raises(UserError, match=r"\(No space left on device\); make room there"):
            write_file(file, "y" * 50_000)
        assert file.read_text() == "x" * 20_000
        assert names(tmp_path) == ["results.json"]
        with pytest.raises(UserError, match=r"no space for a model: it takes 0\.001 GB"):
            check_space(tmp_path, "--save", "a model", 10**6)
        assert refusal(check_output_file, tmp_path / "more.json", "--output") is None
        (tmp_path / "full").write_bytes(b"x" * (64 * 1024 - 20_480))
        with pytest.raises(UserError, match=r"more.json': cannot be written \(No space left on"):
            check_output_file(tmp_path / "more.json", "--output")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_killed_process_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    code = (
        "import itertools, sys; from megatron_dlm.output_file import write_file\n"
        "for n in itertools.count(): write_file(sys.argv[1], (str(n % 10) * 100_000) + 'end')"
    )
    for seed in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(file)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        while not file.exists():
            assert process.poll() is None
        time.sleep(random.Random(seed).random() / 10)
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = file.read_text()
        assert content == content[0] * 100_000 + "end"
        file.unlink()
    write_file(file, "of a process that lives")
    assert names(tmp_path) == ["results.json"]  # nothing is left of the killed ones


@pytest.mark.parametrize(
    "name_of",
    [
        lambda file: file,
        lambda file: Path(os.path.relpath(file)),
        lambda file: file.parent / "more" / ".." / file.name,
        lambda file: file.parent / "link",
        lambda file: file.parent / "hard",
        lambda file: file.parent / "folder" / file.name,
    ],
    ids=["same", "relative", "dots", "link", "hard-link", "linked-folder"],
)
def test_an_input_is_recognised_under_every_name(
    tmp_path: Path, name_of: Callable[[Path], Path]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("{}\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "hard").hardlink_to(file)
    (tmp_path / "folder").symlink_to(tmp_path)
    inputs = [("--data", None), ("--prompts", file)]
    line = refusal(check_output_file, name_of(file), "--output", inputs)
    assert line is not None
    assert line.startswith("--output = ")
    assert f"is the input --prompts = '{file}', which would be lost; name another file" in line
    assert file.read_text() == "{}\n"
    assert refusal(check_output_file, tmp_path / "new", "--output", inputs) is None


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("file/results.json", "(Not a directory)"),
        ("/proc/results.json", "cannot be written"),
        (".", "is a folder"),
        ("pipe", "is no regular file"),
        ("/dev/null", "is no regular file"),
        ("x" * 300, "(File name too long)"),
    ],
)
def test_a_place_that_cannot_be_written_is_said_at_once(
    tmp_path: Path, place: str, words: str
) -> None:
    (tmp_path / "file").write_text("old")
    os.mkfifo(tmp_path / "pipe")
    before = names(tmp_path)
    line = refusal(check_output_file, tmp_path / place, "--output")
    assert line is not None
    assert words in line
    assert names(tmp_path) == before


def test_folders_that_hold_an_input_are_not_replaced(tmp_path: Path) -> None:
    model = tmp_path / "run" / "iter_0000001"
    model.mkdir(parents=True)
    for target in (tmp_path / "run", model, tmp_path / "run" / "." / "iter_0000001"):
        line = refusal(check_output_folder, target, "--save", [("--load", model)])
        assert line is not None
        assert f"holds the input --load = '{model}'" in line
    beside = [tmp_path / "run" / "hf", tmp_path / "other", model / "hf"]
    for target in beside:
        assert refusal(check_output_folder, target, "--save", [("--load", model)]) is None
        assert not target.exists()
    (tmp_path / "file").write_text(json.dumps({}))
    for target in (tmp_path / "file", tmp_path / "file" / "hf"):
        assert refusal(check_output_folder, target, "--save") is not None
