"""Damaged, odd and hostile checkpoints are named, intact ones are used."""

import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dlm import entry, output_file
from megatron_dlm.commands import main
from megatron_dlm.config import Config
from megatron_dlm.errors import UserError
from megatron_dlm.parallel import initialized
from megatron_dlm.training.checkpoint_metadata import checked_metadata
from megatron_dlm.training.checkpointing import verified_checkpoint
from megatron_dlm.training.manifest import MANIFEST, files_of, read_manifest
from megatron_dlm.training.run_folder import LATEST, find_checkpoint, prune, tidy
from tests.limits import largest_file
from tests.tiny import run_config, run_training, save_random_model, write_data

OPTIONS: dict[str, Any] = dict(num_rollouts=3, rollout_batch_size=4, save_interval=1)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, a model, and `run`, a run of three updates with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("damage")
    write_data(folder)
    save_random_model(folder / "dense")
    run_training(run_config(folder, folder / "dense", **OPTIONS))
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original / "run", tmp_path / "run", symlinks=True))


@pytest.fixture(autouse=True)
def warn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "_warned", set())


@contextmanager
def one_process() -> Iterator[None]:
    with initialized(Config.from_dict({"device": "cpu"})):
        yield


def _flip(file: Path, random_: random.Random) -> None:
    content = bytearray(file.read_bytes())
    position = random_.randrange(len(content))
    content[position] ^= 1 << random_.randrange(8)
    file.write_bytes(content)


def _truncate(file: Path, random_: random.Random) -> None:
    os.truncate(file, random_.randrange(file.stat().st_size))


def _append(file: Path, random_: random.Random) -> None:
    file.write_bytes(file.read_bytes() + random_.randbytes(1 + random_.randrange(100)))


def _zero(file: Path, random_: random.Random) -> None:
    file.write_bytes(b"\0" * file.stat().st_size)


def _remove(file: Path, random_: random.Random) -> None:
    file.unlink()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "flip": _flip,
    "truncate": _truncate,
    "append": _append,
    "zero": _zero,
    "remove": _remove,
}


def test_every_file_is_in_the_manifest(run: Path) -> None:
    for checkpoint in run.glob("iter_*"):
        manifest = read_manifest(checkpoint)
        assert manifest is not None
        assert list(manifest) == files_of(checkpoint)
        names = set(manifest)
        assert {".metadata", "metadata.json", "hf/config.json"} <= names
        assert any(name.endswith(".distcp") for name in names)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, before = run / "iter_0000003", run / "iter_0000002"
    random_ = random.Random(3)
    tried = 0
    with one_process():
        assert verified_checkpoint(run) == newest
        for name in files_of(newest):
            file = newest / name
            content = file.read_bytes()
            for kind, damage in DAMAGES.items():
                for _ in range(4 if kind == "flip" else 1):
                    damage(file, random_)
                    entry._warned.clear()
                    assert verified_checkpoint(run) == before, (name, kind)
                    assert f"{newest} is left out: is damaged: {file}" in capsys.readouterr().err
                    with pytest.raises(UserError, match="is damaged: ") as error:
                        verified_checkpoint(newest)
                    assert str(file) in str(error.value)
                    file.write_bytes(content)
                    tried += 1
        assert verified_checkpoint(run) == newest
    assert tried >= 60


def test_the_command_verifies_all_checkpoints_of_a_run(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "--load", str(run)]) == 0
    assert capsys.readouterr().out.count("intact, ") == 3
    file = next((run / "iter_0000002").glob("*.distcp"))
    _flip(file, random.Random(0))
    assert main(["verify", "--load", str(run)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        f"{run / 'iter_0000002'}  DAMAGED",
        f"  {file} is not what was written (SHA-256 differs)",
    ]
    assert main(["verify", "--load", str(run / "iter_0000003")]) == 0
    assert main(["verify", "--load", str(run / "hf")]) == 2


def test_a_damaged_manifest_is_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "iter_0000003" / MANIFEST
    file.write_text(file.read_text()[:-40])
    assert find_checkpoint(run) == run / "iter_0000002"
    assert MANIFEST in capsys.readouterr().err


def test_without_any_intact_checkpoint_there_is_one_line(run: Path) -> None:
    for checkpoint in run.glob("iter_*"):
        (checkpoint / "metadata.json").unlink()
    with pytest.raises(UserError, match=r"none of its 3 checkpoints.*iter_0000003.*metadata\.json"):
        find_checkpoint(run)


@pytest.mark.parametrize("content", [None, "", "three", "-1", "9" * 5000, "7", "٣"])
def test_an_odd_latest_never_starts_from_zero(run: Path, content: str | None) -> None:
    if content is None:
        (run / LATEST).unlink()
    else:
        (run / LATEST).write_text(content)
    assert find_checkpoint(run) == run / "iter_0000003"


def test_a_run_that_was_wound_back_goes_on_from_there(run: Path) -> None:
    (run / LATEST).write_text("2\n")
    assert find_checkpoint(run) == run / "iter_0000002"


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(original / "run", run)
    expected = _losses(original / "run")
    shutil.rmtree(run / "iter_0000003")
    damaged = next((run / "iter_0000002").glob("*.distcp"))
    _flip(damaged, random.Random(1))
    config = _resumed(original, run)
    assert [line["loss"] for line in run_training(config)] == expected
    assert str(damaged) in capsys.readouterr().err
    assert find_checkpoint(run).name == "iter_0000003"
    with one_process():
        assert verified_checkpoint(run) == run / "iter_0000003"


def test_a_run_is_wound_back_to_one_of_its_checkpoints(original: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(original / "run", run)
    lines = run_training(_resumed(original, run, load=str(run / "iter_0000001")))
    assert [line["loss"] for line in lines] == _losses(original / "run")


def _resumed(folder: Path, run: Path, **options: Any) -> Config:
    values = {**OPTIONS, "save": str(run), "load": str(run), "teacher_load": str(folder / "dense")}
    return run_config(folder, folder / "dense", **{**values, **options})


def _losses(run_folder: Path) -> list[float]:
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


class _Bomb:
    """Unpickled without limits, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_a_hostile_index_runs_no_code(original: Path, run: Path, tmp_path: Path) -> None:
    checkpoint = run / "iter_0000003"
    (checkpoint / MANIFEST).unlink()
    bomb = pickle.dumps(_Bomb(tmp_path / "ran"))
    pickle.loads(bomb)
    assert (tmp_path / "ran").exists()  # the bomb is one
    (tmp_path / "ran").unlink()
    (checkpoint / ".metadata").write_bytes(bomb)
    with pytest.raises(UserError, match="no part of a checkpoint"):
        run_training(_resumed(original, run, num_rollouts=4))
    assert not (tmp_path / "ran").exists()


def test_a_hostile_object_among_the_tensors_runs_no_code(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "iter_0000003"
    (checkpoint / MANIFEST).unlink()
    metadata = checked_metadata(checkpoint, "--load")
    index, info = next(
        (index, info)
        for index, info in metadata.storage_data.items()
        if "_extra_state" in index.fqn
    )
    buffer = io.BytesIO()
    torch.save(_Bomb(tmp_path / "ran"), buffer)
    hostile = checkpoint / "hostile.distcp"
    hostile.write_bytes(buffer.getvalue())
    metadata.storage_data[index] = type(info)(hostile.name, 0, len(buffer.getvalue()))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="no plain data"):
        checked_metadata(checkpoint, "--load")
    metadata.storage_data[index] = type(info)("../../hostile", 0, 1)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="outside its folder"):
        checked_metadata(checkpoint, "--load")
    assert not (tmp_path / "ran").exists()


def test_pruning_removes_only_what_the_run_wrote(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "iter_0000002", run / "iter_0000002_best1")
    shutil.copytree(run / "iter_0000002", tmp_path / "elsewhere")
    (run / "iter_0000000").symlink_to(tmp_path / "elsewhere")
    (run / "iter_0000001.txt").write_text("mine")
    shutil.copytree(run / "iter_0000003", run / "iter_0000009")  # of a run that was wound back
    prune(run, newest=3, keep=1, keep_every=2)
    assert sorted(path.name for path in run.glob("iter_*")) == [
        "iter_0000000",
        "iter_0000001.txt",
        "iter_0000002",
        "iter_0000002_best1",
        "iter_0000003",
        "iter_0000009",
    ]
    assert (tmp_path / "elsewhere" / "metadata.json").is_file()


def test_what_a_killed_process_left_is_tidied(run: Path) -> None:
    shutil.copytree(run / "iter_0000003", run / "iter_0000004.tmp")
    (run / "iter_0000003").rename(run / "iter_0000003.old")
    shutil.copytree(run / "iter_0000002", run / "iter_0000002.old")
    (run / "notes.tmp").mkdir()
    tidy(run)
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == [
        "iter_0000001",
        "iter_0000002",
        "iter_0000003",
        "notes.tmp",
    ]


def test_a_full_disk_is_said_before_anything_is_written(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(original / "run", tmp_path / "run"))
    usage = shutil.disk_usage(run)._replace(free=1000)
    monkeypatch.setattr(output_file.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"no space for a checkpoint: it takes 0\.\d+ GB"):
        run_training(_resumed(original, run, load=str(run / "iter_0000002")))
    assert sorted(path.name for path in run.glob("iter_*")) == [
        "iter_0000001",
        "iter_0000002",
        "iter_0000003",
    ]


def test_a_write_that_the_system_refuses_loses_no_checkpoint(
    original: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(original / "run", tmp_path / "run"))
    # Files of tensors are larger.
    with largest_file(100_000), pytest.raises(UserError, match="iter_0000003 could not be written"):
        run_training(_resumed(original, run, load=str(run / "iter_0000002")))
    with one_process():  # the run was wound back; what it had saved after that is still whole
        assert verified_checkpoint(run) == run / "iter_0000002"
        assert verified_checkpoint(run / "iter_0000003") == run / "iter_0000003"
