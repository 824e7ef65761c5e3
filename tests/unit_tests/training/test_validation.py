"""The validation loss is the training loss on fixed states; measuring does not affect training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_dlm.config import Config
from megatron_dlm.errors import UserError
from megatron_dlm.parallel import initialized
from megatron_dlm.training.checkpointing import find_checkpoint
from megatron_dlm.training.inputs import read_inputs
from tests.tiny import run_config, run_training, save_random_model, write_data

SCP: dict[str, Any] = dict(objective="scp", global_batch_size=4, train_iters=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validation")
    write_data(folder)
    save_random_model(folder / "dense")
    save_random_model(folder / "moe", moe=True)
    return folder


def run(folder: Path, save: Path, model: str = "dense", **options: Any) -> list[dict[str, Any]]:
    return run_training(run_config(folder, folder / model, save=str(save), **options))


def held_out(folder: Path, objective: str = "scp") -> dict[str, str]:
    if objective == "scp":
        return {"valid_data_path": str(folder / "corpus_heldout")}
    return {"valid_data": str(folder / "examples.jsonl")}


def saved_tensors(save: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a run, by name."""
    with initialized(Config.from_dict({"device": "cpu"})):
        state = dist_checkpointing.load_plain_tensors(str(find_checkpoint(save)))
    flat: dict[str, torch.Tensor] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            flat[prefix] = value
        elif isinstance(value, dict):
            for key, part in value.items():
                walk(f"{prefix}.{key}", part)

    walk("", state)
    return flat


@pytest.mark.parametrize("model", ["dense", "moe"])
@pytest.mark.slow
def test_training_is_the_same_bit_for_bit(folder: Path, tmp_path: Path, model: str) -> None:
    plain = run(folder, tmp_path / "plain", model, **SCP)
    prompts = dict(eval_prompts=str(folder / "prompts.jsonl"), eval_prompts_interval=3)
    evaluated = dict(prompts, eval_num_prompts=3, eval_max_response_length=8)
    measured = dict(held_out(folder), eval_interval=2, eval_iters=2, **evaluated)
    lines = run(folder, tmp_path / "eval", model, **SCP, **measured)
    assert ["evaluation" in line for line in lines] == [False, False, True, True]
    assert [line["validation_loss"] is not None for line in lines] == [False, True, False, True]
    assert all(line["validation_loss"] is None for line in plain)
    for line, other in zip(lines, plain, strict=True):
        assert (line["loss"], line["grad_norm"]) == (other["loss"], other["grad_norm"])
    one, two = saved_tensors(tmp_path / "plain"), saved_tensors(tmp_path / "eval")
    assert one.keys() == two.keys()
    assert any("exp_avg_sq" in name for name in one)
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


@pytest.mark.parametrize(
    ("objective", "options"),
    [("scp", {}), ("scp", {"loss_normalization": "row_mean"}), ("sft", {}), ("next_token", {})],
)
@pytest.mark.slow
def test_frozen_weights_have_one_loss(
    folder: Path, tmp_path: Path, objective: str, options: dict[str, Any]
) -> None:
    """Equal at every step, packing and batch size for the same samples."""
    frozen = dict(
        objective=objective, lr=1e-30, min_lr=0.0, weight_decay=0.0, **held_out(folder, objective)
    )
    losses = [
        line["validation_loss"]
        for name, layout in {
            "a": dict(global_batch_size=4, eval_iters=4, eval_interval=1, train_iters=3),
            "b": dict(global_batch_size=8, eval_iters=2, micro_batch_size=4, train_iters=1),
        }.items()
        for line in run(folder, tmp_path / name, **frozen, **layout, **options)
    ]
    assert len(losses) == 4
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    assert losses[0] == losses[1] == losses[2]


def test_next_token_validation_is_the_loss_that_training_measures(
    folder: Path, tmp_path: Path
) -> None:
    """Without random states: one epoch of the same data is one global batch."""
    options = dict(objective="next_token", lr=1e-30, min_lr=0.0, weight_decay=0.0, train_iters=1)
    line = run(
        folder,
        tmp_path / "run",
        **options,
        **held_out(folder, "next_token"),
        global_batch_size=48,
        micro_batch_size=8,
        eval_iters=1,
    )[0]
    assert line["validation_loss"] == pytest.approx(line["loss"], rel=1e-5)


def test_a_resumed_run_measures_what_it_would_have(folder: Path, tmp_path: Path) -> None:
    options = dict(SCP, **held_out(folder), eval_interval=1, eval_iters=2, lr_decay_iters=4)
    whole = run(folder, tmp_path / "whole", **options)
    save = tmp_path / "parts"
    run(folder, save, **{**options, "train_iters": 2})
    lines = run_training(run_config(folder, save, **options, save=str(save)))
    assert [line["validation_loss"] for line in lines] == [
        line["validation_loss"] for line in whole
    ]
    assert [line["loss"] for line in lines] == [line["loss"] for line in whole]


def test_too_little_held_out_data(folder: Path) -> None:
    config = run_config(folder, folder / "dense", **SCP, **held_out(folder), eval_iters=1000)
    with pytest.raises(UserError, match=r"--valid-data-path = .*has \d+ samples.*--eval-iters \d+"):
        read_inputs(config)
