"""The best checkpoint by a figure on held-out data: recorded, kept, and the same after a resume."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_dlm import entry
from megatron_dlm.evaluation.rewards import Record
from megatron_dlm.training import checkpoint_saving
from megatron_dlm.training.best_checkpoint import (
    BEST,
    HELD_OUT,
    HeldOutFigure,
    add_figure,
    best_iteration,
    lacks_accuracy,
    read_figure,
    write_figure,
)
from megatron_dlm.training.manifest import damages, record_files, write_manifest
from megatron_dlm.training.run_folder import iteration_folder, saved_iterations
from megatron_dlm.training.validation import Validation
from tests.tiny import run_config, run_training, save_random_model, write_data


def _run_of(folder: Path, figures: dict[int, HeldOutFigure | None]) -> Path:
    for iteration, figure in figures.items():
        checkpoint = iteration_folder(folder, iteration)
        checkpoint.mkdir()
        if figure is not None:
            write_figure(checkpoint, figure)
    return folder


def _loss(value: float) -> HeldOutFigure:
    return HeldOutFigure("validation_loss", value, higher_is_better=False)


def _accuracy(value: float, data: str = "") -> HeldOutFigure:
    return HeldOutFigure("accuracy/static", value, higher_is_better=True, data=data)


@pytest.mark.parametrize(
    ("figures", "newest", "expected"),
    [
        ({1: _loss(3.0), 2: _loss(1.0), 3: _loss(2.0)}, 3, 2),
        ({1: _accuracy(0.3), 2: _accuracy(0.1), 3: _accuracy(0.2)}, 3, 1),
        ({1: _loss(1.0), 2: _loss(1.0)}, 2, 1),
        ({1: _loss(2.0), 2: None, 3: _loss(float("nan"))}, 3, 1),
        ({1: _loss(2.0), 5: _loss(1.0)}, 2, 1),
        ({1: _loss(0.1), 2: _accuracy(0.4), 3: _accuracy(0.5)}, 3, 3),
        ({1: _accuracy(0.9, "other prompts"), 2: _accuracy(0.5), 3: _accuracy(0.4)}, 3, 2),
        ({1: None}, 1, None),
        ({}, 0, None),
    ],
    ids=[
        "lower",
        "higher",
        "equal",
        "missing",
        "wound_back",
        "another_metric",
        "other_data",
        "none",
        "empty",
    ],
)
def test_the_best_of_a_run(
    tmp_path: Path, figures: dict[int, HeldOutFigure | None], newest: int, expected: int | None
) -> None:
    assert best_iteration(_run_of(tmp_path, figures), newest) == expected


def test_a_damaged_figure_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entry, "_warned", set())
    _run_of(tmp_path, {1: _loss(3.0), 2: _loss(1.0)})
    file = tmp_path / "iter_0000002" / HELD_OUT
    file.write_text(file.read_text()[:-9])
    assert best_iteration(tmp_path, 2) == 1
    assert f"{file} is left out" in capsys.readouterr().err


def test_a_run_keeps_its_best_checkpoint_through_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path)
    save_random_model(tmp_path / "dense")
    losses = iter([3.0, 1.0, 2.0, 4.0, 0.5, 5.0])
    measured = []

    def loss(self: Validation, model: Any) -> float:
        measured.append(next(losses))
        return measured[-1]

    monkeypatch.setattr(Validation, "loss", loss)
    options: dict[str, Any] = dict(
        objective="sft",
        valid_data=str(tmp_path / "examples.jsonl"),
        save=str(tmp_path / "run"),
        save_interval=1,
        keep_checkpoints=1,
        keep_best_checkpoint=True,
        eval_interval=2,  # other checkpoints are measured when they are saved
        eval_iters=1,
        train_iters=6,
        lr_decay_iters=6,
    )
    run = tmp_path / "run"

    def stops(updates: int, expected: list[int], best: int, value: float, load: Path) -> None:
        config = run_config(tmp_path, load, **{**options, "train_iters": updates})
        run_training(config)
        assert saved_iterations(run) == expected
        assert json.loads((run / BEST).read_text()) == {
            "checkpoint": f"iter_{best:07d}",
            "iteration": best,
            "metric": "validation_loss",
            "value": value,
            "higher_is_better": False,
        }

    stops(4, [2, 4], 2, 1.0, tmp_path / "dense")
    stops(6, [5, 6], 5, 0.5, run)
    assert measured == [3.0, 1.0, 2.0, 4.0, 0.5, 5.0]


ACCURACIES = (0.25, 0.75, 0.5, 0.75, 0.5, 0.25, 0.0)


def rate(records: Sequence[Record], responses: Sequence[str]) -> list[float]:
    """A reward: the first evaluation rates a quarter of its four responses right, and so on."""
    right = int(4 * ACCURACIES[len(_rated)])
    _rated.append(right)
    return [float(i < right) for i in range(len(responses))]


_rated: list[int] = []


def test_the_best_by_accuracy_outlives_later_ones(tmp_path: Path) -> None:
    """The newest, every fifth and the best stay; each new best is saved, a later equal is not."""
    prompts, _ = write_data(tmp_path)
    save_random_model(tmp_path / "dense")
    _rated.clear()
    options: dict[str, Any] = dict(
        objective="sft",
        save=str(tmp_path / "run"),
        save_interval=5,
        keep_checkpoints=1,
        keep_checkpoint_every=5,
        keep_best_checkpoint=True,
        eval_prompts=str(prompts),
        eval_prompts_interval=1,
        eval_num_prompts=4,
        eval_max_response_length=4,
        eval_decodings=("static:1",),
        reward=f"{__name__}:rate",
        lr_decay_iters=7,
    )
    run, saved = tmp_path / "run", []

    def publish(*args: Any) -> None:
        saved.append(args[2])
        original(*args)

    original = checkpoint_saving.publish
    with mock.patch.object(checkpoint_saving, "publish", publish):
        for updates, load in ((4, tmp_path / "dense"), (7, run)):
            lines = run_training(run_config(tmp_path, load, **options, train_iters=updates))
            best = json.loads((run / BEST).read_text())
            assert (best["iteration"], best["metric"]) == (2, "accuracy/static_1")
            assert (best["value"], best["higher_is_better"]) == (0.75, True)
    # New bests after updates 1 and 2; ends of the two parts at 4 and 7; one that is due at 5.
    assert saved == [1, 2, 4, 5, 7]
    assert saved_iterations(run) == [2, 5, 7]
    accuracies = [line["evaluation"]["static_1"]["accuracy"] for line in lines]
    assert accuracies == list(ACCURACIES)


def test_a_figure_comes_later_without_damage(tmp_path: Path) -> None:
    checkpoint = iteration_folder(tmp_path, 3)
    checkpoint.mkdir()
    write_figure(checkpoint, _loss(2.0))
    write_manifest(checkpoint, record_files(checkpoint, [HELD_OUT]))
    assert lacks_accuracy(checkpoint)
    add_figure(checkpoint, _accuracy(0.5))
    assert read_figure(checkpoint) == _accuracy(0.5)
    assert not lacks_accuracy(checkpoint)
    assert damages(checkpoint, (0, 1)) == []
    # The new file has a record of its own.
    (checkpoint / HELD_OUT).write_text((checkpoint / HELD_OUT).read_text().replace("0.5", "0.6"))
    [damage] = damages(checkpoint, (0, 1))
    assert HELD_OUT in damage
