"""A cell of the study: one recipe under one seed, and the file that its result becomes.

A result states the specification that it is of. A cell is finished when its file states the one
that it would have now, so an interrupted study goes on where it was and a changed recipe is run
again.
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
from megatron_dlm.data.shard_store import publish

GOLDEN_LOSSES = "tests/golden/losses.json"
CURVE_POINTS = 120
"""Points of a training curve that a result keeps, at most."""
CURVES = ("loss", "response_tokens_total", "response_length", "tokens_per_forward")


@dataclass(frozen=True)
class Cell:
    """One recipe under one seed."""

    recipe: Recipe
    seed: int
    num_heldout: int

    @property
    def name(self) -> str:
        """Unique in the study, fit for a file name."""
        return f"{self.recipe.name}-seed{self.seed}"

    def specification(self) -> dict[str, Any]:
        """Everything that decides the result, as a JSON object.

        The method is in it by the golden losses of its objective, which are rewritten when the
        method, the generated problems or the models change, and only then. Those of rollouts mixed
        with the teacher's responses concern only recipes that mix them.
        """
        documents = self.recipe.documents
        data = (
            {"num_documents": documents} if documents else {"num_prompts": self.recipe.num_prompts}
        )
        specification = {
            "training": self.recipe.training_options(self.seed),
            **data,
            "num_heldout": self.num_heldout,
            "max_response_length": max_response_length(),
            "evaluations": [asdict(evaluation) for evaluation in self.recipe.evaluations],
            "teacher": _teacher_digest(),
            "problem_seeds": {"prompts": PROMPTS_SEED, "heldout": HELDOUT_SEED},
            "golden_losses": _golden_digest(
                self.recipe.objective, self.recipe.mixes_teacher_responses
            ),
        }
        parsed = json.loads(json.dumps(specification))  # as it will be read from the result
        assert isinstance(parsed, dict)
        return parsed


def all_cells(sizes: Sizes) -> list[Cell]:
    """The cells of a study, by recipe and seed."""
    return [
        Cell(recipe, seed, sizes.pretraining_heldout if recipe.documents else sizes.heldout)
        for recipe in recipes(sizes)
        for seed in range(1, recipe.seeds + 1)
    ]


def result_path(folder: Path, cell: Cell) -> Path:
    """Where a cell's result is."""
    return folder / f"{cell.name}.json"


def finished_result(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """A cell's result, or None where it has none of its present specification."""
    path = result_path(folder, cell)
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(result, dict)
    return result if result["specification"] == cell.specification() else None


def write_result(
    folder: Path, cell: Cell, specification: dict[str, Any], measured: dict[str, Any]
) -> None:
    """Publish a cell's result.

    Args:
        folder: Of all results.
        cell: Whose result it is.
        specification: The cell's, taken before it ran.
        measured: All that came out.
    """
    identity = {"recipe": cell.recipe.name, "seed": cell.seed, "specification": specification}
    _write(result_path(folder, cell), {**identity, **measured})


def restore_results(
    published: Sequence[dict[str, Any]], cells: Sequence[Cell], folder: Path
) -> None:
    """Take over what an earlier study, on another machine perhaps, has published.

    Args:
        published: Results of cells, as in `results.json`.
        cells: Of this study; those that are finished already stay.
        folder: Of this study's results.
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
    publish(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def training_summary(metrics_file: Path) -> dict[str, Any]:
    """What a result keeps of `metrics.jsonl`: totals, and curves averaged over stretches of steps.

    Every point of a curve is the mean over as many steps as its distance from the point before;
    `step` is the last of them. A quantity that the objective does not have is left out. The
    validation loss has steps of its own, those that it was measured at.
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
        "curves": curves,
    }


@cache
def _golden_digest(objective: str, mixes_teacher_responses: bool) -> str:
    golden = json.loads((REPOSITORY / GOLDEN_LOSSES).read_text())
    own = {
        name: losses
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
