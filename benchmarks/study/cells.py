"""A cell of the study: one recipe under one seed, and the file with its result.

A result contains its specification. A cell is finished when its file has the current specification,
so an interrupted study continues where it was and a changed recipe is run again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.environment import REPOSITORY
from benchmarks.study.problems import HELDOUT_SEED, PROMPTS_SEED
from benchmarks.study.recipes import (
    TEACHER,
    Recipe,
    Sizes,
    max_response_length,
    recipes,
)
from megatron_dlm.output_file import write_file

GOLDEN_LOSSES = "tests/golden/losses.json"
CURVE_POINTS = 120
"""Most points of a training curve in a result."""
CURVES = ("loss", "tokens_per_forward")


@dataclass(frozen=True)
class Cell:
    """One recipe under one seed."""

    recipe: Recipe
    seed: int
    num_heldout: int

    @property
    def name(self) -> str:
        """Name, unique in the study, also of its file."""
        return f"{self.recipe.name}-seed{self.seed}"

    def specification(self) -> dict[str, Any]:
        """Everything that the result depends on, as a JSON object.

        Golden losses of the objective stand for the method: they are rewritten only when the
        method, the generated problems or the models change. Those of rollouts mixed with the
        teacher's responses count only for recipes that mix them.
        """
        specification = {
            **trained_by(self.recipe, self.seed),
            "num_heldout": self.num_heldout,
            "max_response_length": max_response_length(),
            "evaluations": [asdict(evaluation) for evaluation in self.recipe.evaluations],
        }
        parsed = json.loads(json.dumps(specification))  # as read from the result
        assert isinstance(parsed, dict)
        return parsed


def trained_by(recipe: Recipe, seed: int) -> dict[str, Any]:
    """The part of a specification that the trained model depends on."""
    data: dict[str, Any] = {"num_prompts": recipe.num_prompts}
    if recipe.documents:
        data = {"num_documents": recipe.documents}
        if recipe.corpus != "seen":
            data["corpus"] = recipe.corpus
    models = {option: trained_by(model, seed) for option, model in recipe.models.items()}
    return {
        "training": recipe.training_options(seed),
        **data,
        **({"models": models} if models else {}),
        "teacher": _teacher_digest(),
        "problem_seeds": {"prompts": PROMPTS_SEED, "heldout": HELDOUT_SEED},
        "golden_losses": _golden_digest(recipe.objective, recipe.mixes_teacher_responses),
    }


def all_cells(sizes: Sizes) -> list[Cell]:
    """The cells of a study, by recipe and seed."""
    return [
        Cell(recipe, seed, sizes.pretraining_heldout if recipe.documents else sizes.heldout)
        for recipe in recipes(sizes)
        for seed in range(1, recipe.seeds + 1)
    ]


def result_path(folder: Path, cell: Cell) -> Path:
    """File of a cell's result."""
    return folder / f"{cell.name}.json"


def finished_result(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """A cell's result; None if there is none with the current specification."""
    path = result_path(folder, cell)
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(result, dict)
    return result if result["specification"] == cell.specification() else None


def outdated_results(results: Sequence[dict[str, Any]], cells: Sequence[Cell]) -> list[str]:
    """Results of another specification than that of their cell today: "recipe seed n" of each."""
    specifications = {(cell.recipe.name, cell.seed): cell.specification() for cell in cells}
    names = [(result["recipe"], result["seed"], result["specification"]) for result in results]
    return [
        f"{recipe} seed {seed}"
        for recipe, seed, specification in names
        if specifications.get((recipe, seed)) != specification
    ]


def write_result(
    folder: Path, cell: Cell, specification: dict[str, Any], measured: dict[str, Any]
) -> None:
    """Publish a cell's result.

    Args:
        folder: Folder of all results.
        cell: The cell.
        specification: Of the cell, taken before it ran.
        measured: Everything measured.
    """
    identity = {"recipe": cell.recipe.name, "seed": cell.seed, "specification": specification}
    _write(result_path(folder, cell), {**identity, **measured})


def restore_results(
    published: Sequence[dict[str, Any]], cells: Sequence[Cell], folder: Path
) -> None:
    """Take over published results of an earlier study, perhaps of another machine.

    Args:
        published: Results of cells, as in `results.json`.
        cells: Of this study; finished ones keep their results.
        folder: Folder of this study's results.
    """
    folder.mkdir(parents=True, exist_ok=True)
    by_name = {(result["recipe"], result["seed"]): result for result in published}
    for cell in cells:
        result = by_name.get((cell.recipe.name, cell.seed))
        if result is None or finished_result(folder, cell) is not None:
            continue
        if result["specification"] == cell.specification():
            _write(result_path(folder, cell), result)


def _write(path: Path, result: dict[str, Any]) -> None:
    text = json.dumps(result, indent=1) + "\n"
    write_file(path, text)


def training_summary(metrics_file: Path) -> dict[str, Any]:
    """Totals and curves of `metrics.jsonl`, curves averaged over stretches of steps.

    A point of a curve is the mean over the steps since the point before; `step` is the last of
    them. A quantity that the objective does not have is left out. The validation loss has its own
    steps, at which it was measured.
    """
    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    stretch = -(-len(lines) // CURVE_POINTS)
    stretches = [lines[start : start + stretch] for start in range(0, len(lines), stretch)]
    curves: dict[str, list[float]] = {"step": [part[-1]["step"] for part in stretches]}
    for name in CURVES:
        if lines[0].get(name) is not None:
            curves[name] = [
                round(sum(line[name] for line in part) / len(part), 5) for part in stretches
            ]
    measured = [line for line in lines if line.get("validation_loss") is not None]
    if measured:
        curves["validation_step"] = [line["step"] for line in measured]
        curves["validation_loss"] = [round(line["validation_loss"], 5) for line in measured]
    return {
        "updates": lines[-1]["step"],
        "response_tokens": lines[-1]["response_tokens_total"],
        "trained_tokens": lines[-1]["trained_tokens_total"],
        "flops": lines[-1]["flops_total"],
        "seconds": round(sum(sum(line["time"].values()) for line in lines), 1),
        "curves": curves,
    }


@cache
def _golden_digest(objective: str, mixes_teacher_responses: bool) -> str:
    golden = json.loads((REPOSITORY / GOLDEN_LOSSES).read_text())
    # Sums in another order change the digits after these, and no method.
    own = {
        name: [{key: f"{value:.3g}" for key, value in update.items()} for update in losses]
        for name, losses in golden.items()
        if name.split()[0] == objective
        and (mixes_teacher_responses or "teacher responses" not in name)
    }
    assert own, objective
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


@cache
def _teacher_digest() -> str:
    digest = hashlib.sha256()
    for file in ("config.json", "model.safetensors"):
        digest.update((REPOSITORY / TEACHER / file).read_bytes())
    return digest.hexdigest()
