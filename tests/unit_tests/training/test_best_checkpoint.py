"""The best checkpoint by a figure on held-out data: recorded, kept, and the same after a resume."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm import entry
from megatron_dlm.training.best_checkpoint import (
    BEST,
    HELD_OUT,
    HeldOutFigure,
    best_iteration,
    write_figure,
)
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


def _accuracy(value: float) -> HeldOutFigure:
    return HeldOutFigure("accuracy", value, higher_is_better=True)


@pytest.mark.parametrize(
    ("figures", "newest", "expected"),
    [
        ({1: _loss(3.0), 2: _loss(1.0), 3: _loss(2.0)}, 3, 2),
        ({1: _accuracy(0.3), 2: _accuracy(0.1), 3: _accuracy(0.2)}, 3, 1),
        ({1: _loss(1.0), 2: _loss(1.0)}, 2, 1),
        ({1: _loss(2.0), 2: None, 3: _loss(float("nan"))}, 3, 1),
        ({1: _loss(2.0), 5: _loss(1.0)}, 2, 1),
        ({1: _loss(0.1), 2: _accuracy(0.4), 3: _accuracy(0.5)}, 3, 3),
        ({1: None}, 1, None),
        ({}, 0, None),
    ],
    ids=["lower", "higher", "equal", "missing", "wound back", "another metric", "none", "empty"],
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
