"""Files that are pipes, folders or links, and run folders that are in use."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_dlm.training.run_lock import owned_run_folder
from tests.functional_tests.entry_points import PRETRAIN, Call, options


def test_a_run_folder_that_another_process_writes_is_refused(
    files: Path, call: Call, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with owned_run_folder(run):
        (run / "metrics.jsonl").write_text("untouched")
        found = call(PRETRAIN, *options(files, save=run))
        found.check_error("--save", str(run), "writes there since", "choose another folder")
        assert (run / "metrics.jsonl").read_text() == "untouched"
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl"]


def test_bad_input_leaves_no_new_run_folder(files: Path, call: Call, tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = call(PRETRAIN, *options(files, save=run, prompts=tmp_path / "missing.jsonl"))
    found.check_error("--prompts", "missing.jsonl")
    assert not run.exists()


@pytest.mark.parametrize("name", ["prompts.jsonl", "run.yaml", "dense/tokenizer_config.json"])
def test_a_pipe_is_no_file(files: Path, call: Call, tmp_path: Path, name: str) -> None:
    shutil.copytree(files / "dense", tmp_path / "dense")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    changes: dict[str, object] = {"load": tmp_path / "dense"}
    if not name.startswith("dense"):
        changes["prompts" if name == "prompts.jsonl" else "config"] = tmp_path / name
    call(PRETRAIN, *options(files, **changes)).check_error(name, "is no regular file")


@pytest.mark.parametrize("file", ["../dense/model.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_names_files_of_its_folder(
    files: Path, call: Call, tmp_path: Path, file: str
) -> None:
    model = Path(shutil.copytree(files / "dense", tmp_path / "model"))
    names = list(load_file(model / "model.safetensors"))
    (model / "model.safetensors").rename(model / "other.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
    call(PRETRAIN, *options(files, load=model)).check_error(str(index), file, "no file of this")


def test_a_yaml_file_that_nests_without_end(files: Path, call: Call, tmp_path: Path) -> None:
    lines = ["a: &a [x, x]"]
    for before, name in itertools.pairwise("abcdefghijklmnopqrstuvwxyz"):
        lines.append(f"{name}: &{name} [*{before}, *{before}]")
    (tmp_path / "run.yaml").write_text("\n".join([*lines, "lr: *z"]))
    found = call(PRETRAIN, "--config", tmp_path / "run.yaml")
    found.check_error("run.yaml")
    assert len(found.stderr) < 2000
