"""A run that diverges says when and on what, saves nothing damaged, or leaves such updates out."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dlm.commands import main
from megatron_dlm.config import Config
from megatron_dlm.entry import DIVERGED_STATUS
from megatron_dlm.training.run_folder import saved_iterations
from tests.distributed_tests.spawn import run_distributed
from tests.faults.runs import events, metrics, tensors
from tests.tiny import run_config, run_training, save_random_model, write_data

STEP = {"objective": "sft", "train_iters": 4, "lr_warmup_iters": 0, "lr_decay_style": "constant"}

TOO_LARGE = {"lr": 1e15, "save_interval": 1}
"""Weights of 1e15 after one update are finite; what the network makes of them is not."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("divergence")
    write_data(folder)
    save_random_model(folder / "dense")
    return folder


def _start(folder: Path, run: Path, **options: Any) -> int:
    options = {**STEP, **options}
    model = options.pop("load", folder / "dense")
    config = run_config(folder, Path(model), **options, save=str(run))
    file = run.with_suffix(".yaml")
    file.write_text(config.to_yaml())
    return main(["train", "--config", str(file)])


def test_a_diverged_run_names_what_a_person_needs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert _start(folder, run, **TOO_LARGE) == DIVERGED_STATUS
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    file = run / "diverged_update_0000002.jsonl"
    for part in (
        "error: training diverged at update 2 of rollout 2: loss ",
        f"the last good checkpoint is {run / 'iter_0000001'}, ",
        f"samples of the batch: {file}; ",
    ):
        assert part in line
    assert saved_iterations(run) == [1]
    assert events(run)[-1] == "diverged"
    samples = [json.loads(text) for text in file.read_text().splitlines()]
    assert [sample["sample"] for sample in samples] == [4, 5, 6, 7]
    given = [json.loads(text) for text in (folder / "examples.jsonl").read_text().splitlines()]
    for sample in samples:
        path, _, number = sample["line"].rpartition(":")
        assert path == str(folder / "examples.jsonl")
        record = given[int(number) - 1]
        assert record["messages"][0]["content"] in sample["prompt"]
        assert record["response"] in sample["response"]
    # Each sample is a micro-batch of its own; where one loss is not finite, their mean is not.
    losses = [float(sample["micro_batch_loss"]) for sample in samples]
    assert not all(map(math.isfinite, losses))


def test_an_infinite_gradient_of_a_finite_loss_changes_no_weight(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = save_random_model(tmp_path / "model", tie_word_embeddings=False), tmp_path / "run"
    file = model / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] *= 1e25  # so are the gradients below it; their squares are infinite
    save_file(weights, file, {"format": "pt"})
    assert _start(folder, run, load=str(model)) == DIVERGED_STATUS
    error = capsys.readouterr().err
    assert "at update 1 of rollout 1: loss " in error
    assert "gradient norm inf; the last good checkpoint is none, " in error
    assert saved_iterations(run) == []
    sample = json.loads((run / "diverged_update_0000001.jsonl").read_text().splitlines()[0])
    assert math.isfinite(sample["loss"])
    assert sample["grad_norm"] == "inf"


def test_diverged_updates_are_left_out_up_to_a_number_in_a_row(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = {**TOO_LARGE, "train_iters": 5, "on_divergence": "skip:2"}
    assert _start(folder, run, **options) == DIVERGED_STATUS
    printed = capsys.readouterr()
    assert "update 3 diverged (loss " in printed.out
    assert "and is left out, 2 of 2 in a row, its samples are in " in printed.out
    assert "at update 4 of rollout 4: " in printed.err
    assert "after 2 updates in a row that were left out" in printed.err
    lines = metrics(run)
    assert [line["skipped_updates"] for line in lines] == [0, 1, 2]
    assert [line["loss"] is None or line["grad_norm"] is None for line in lines] == [
        False,
        True,
        True,
    ]


def _rank(rank: int, config: Config) -> None:
    run_training(config)


@pytest.mark.parametrize(
    "layout",
    [
        {"use_distributed_optimizer": True},
        {"pipeline_model_parallel_size": 2},
    ],
    ids=["DP2 distributed", "PP2"],
)
def test_an_update_that_is_left_out_changes_nothing_on_any_rank(
    folder: Path, tmp_path: Path, layout: dict[str, Any]
) -> None:
    """The last checkpoint, after two such updates, holds the tensors of the first one."""
    run = tmp_path / "run"
    options = {**STEP, **TOO_LARGE, **layout, "train_iters": 3, "on_divergence": "skip:2"}
    config = run_config(folder, folder / "dense", **options, save=str(run))
    run_distributed(_rank, 2, config)
    assert [line["skipped_updates"] for line in metrics(run)] == [0, 1, 2]
    first, last = tensors(run / "iter_0000001"), tensors(run)
    assert first.keys() == last.keys()
    for name, tensor in first.items():
        assert torch.equal(last[name], tensor), name


def test_weights_that_are_not_finite_are_never_saved(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The update itself makes them: its loss and gradient are finite."""
    model, run = save_random_model(tmp_path / "model", initializer_range=2.0), tmp_path / "run"
    # Weights above 1.2 overflow as they are decayed by a factor of 1 - 3e38.
    decay = {"lr": 3e37, "weight_decay": 10.0}
    assert _start(folder, run, load=str(model), save_interval=1, **decay) == DIVERGED_STATUS
    assert "its weights are NaN or infinite; the last good checkpoint is none" in (
        capsys.readouterr().err
    )
    assert saved_iterations(run) == []
