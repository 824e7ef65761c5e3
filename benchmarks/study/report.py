"""results.json from the cells, and report.md with its plots from results.json.

The report also says which cells the study would run again today.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.environment import versions
from benchmarks.study.cells import Cell, all_cells, finished_result, outdated_results
from benchmarks.study.claims import CLOSE_POINTS, SOLVING, papers_claims, plateau_claims
from benchmarks.study.plots import plot_accuracy_against_speed, plot_forgetting, plot_rollout_speed
from benchmarks.study.recipes import BLOCK_SIZES, TRAINED_BLOCK_SIZE, Recipe, Sizes, recipes
from benchmarks.study.statistics import Result
from benchmarks.study.tables import (
    claims_table,
    cost_table,
    forgetting_table,
    missing_list,
    seeds_table,
    settings_table,
)
from megatron_dlm.errors import bad_value
from megatron_dlm.output_file import write_file

RESULTS, REPORT = "results.json", "report.md"


def collect(cells: Sequence[Cell], folder: Path, output: Path, sizes: Sizes) -> None:
    """Write results.json: what is finished of a study, and what it was measured on.

    Args:
        cells: The whole study.
        folder: Of the cells' results.
        output: Folder to write into.
        sizes: Of the study.
    """
    output.mkdir(parents=True, exist_ok=True)
    finished = [finished_result(folder, cell) for cell in cells]
    study = {
        "versions": versions(),
        "sizes": asdict(sizes),
        "expected": Counter(cell.recipe.name for cell in cells),
        "cells": [result for result in finished if result is not None],
    }
    text = json.dumps(study, indent=1) + "\n"
    write_file(output / RESULTS, text)


def published_results(output: Path) -> list[dict[str, Any]]:
    """The cells of the results.json in a folder, which need not exist."""
    path = output / RESULTS
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else []
    assert isinstance(cells, list)
    return cells


def write_report(output: Path) -> None:
    """Write report.md and its plots from results.json, and say which cells are of earlier versions.

    Raises:
        UserError: There is no results.json.
    """
    path = output / RESULTS
    if not path.is_file():
        raise bad_value("--output", str(output), f"holds no {RESULTS}", "run the study first")
    study = json.loads(path.read_text(encoding="utf-8"))
    sizes = Sizes(**study["sizes"])
    known, outdated = recipes(sizes), outdated_results(study["cells"], all_cells(sizes))
    plot_accuracy_against_speed(study["cells"], known, output / "accuracy_vs_speed.png")
    plot_rollout_speed(study["cells"], known, output / "rollout_speed.png")
    plot_forgetting(study["cells"], known, output / "forgetting.png")
    write_file(output / REPORT, render(study, known, outdated))


def render(study: dict[str, Any], known: Sequence[Recipe], outdated: Sequence[str]) -> str:
    """The report.

    Args:
        study: results.json.
        known: The recipes that it can be about.
        outdated: Cells that ran before recipe or method changed.
    """
    results: list[Result] = study["cells"]
    incomplete = missing_list(results, study["expected"])
    sections = [
        "# The objectives side by side on the tiny model",
        "Written by `make study` from [results.json](results.json); all numbers, means and "
        "verdicts are computed.",
        f"**Incomplete.** Missing cells: {incomplete}." if incomplete else "",
        "**Of an earlier version.** Recipe or golden losses have changed since these cells ran, at "
        f"the commits named below; `make study` runs them again: {', '.join(outdated)}."
        if outdated
        else "",
        _setup(study),
        "## The papers' claims",
        "Both sides are means ± sample standard deviation over seeds; accuracy and its losses in "
        "points, speed in tokens per forward. A claim of *more* is supported if the first side "
        "exceeds the second by more than one standard deviation over seeds (pooled), not "
        "supported if it falls short by more, and not distinguishable in between. *Close* means "
        f"within {CLOSE_POINTS:g} points; not distinguishable is what differs by less than one "
        "standard deviation that is itself larger. Answers show no forgetting, and are not "
        f"distinguishable, if no run of either side solves {SOLVING:g} % of the problems of the "
        "kind that its corpus has. The papers' models are a thousand times larger and their "
        "problems are others, so only directions are compared. Not measured here: training with "
        "larger blocks (OPDLM figures 3b, 4 and 6) and larger teachers (tables 7 and 8).",
        claims_table(papers_claims(results)),
        "## Within reach of the teacher",
        claims_table(plateau_claims(results)),
        f"## Trained and decoded with blocks of {TRAINED_BLOCK_SIZE}",
        settings_table(results, known, TRAINED_BLOCK_SIZE),
        "![Accuracy against tokens per forward](accuracy_vs_speed.png)",
        "Seed by seed; a mean hides runs that never improved:",
        seeds_table(results, known),
        f"## Trained with blocks of {TRAINED_BLOCK_SIZE}, decoded with larger ones",
        "Not a claim of a paper: decoding with a block size that the model was not trained with.",
    ]
    for size in BLOCK_SIZES:
        if size != TRAINED_BLOCK_SIZE:
            sections += [f"Blocks of {size}:", settings_table(results, known, size)]
    forgetting = forgetting_table(results, known)
    if forgetting is not None:
        sections += [
            "## Forgetting in continual pretraining",
            _FORGETTING.format(
                problems=study["sizes"]["pretraining_heldout"],
                teachers=study["sizes"]["heldout"],
                block_size=TRAINED_BLOCK_SIZE,
            ),
            forgetting,
            "![Losses of continual pretraining](forgetting.png)",
        ]
    sections += [
        "## Tokens per forward over training",
        "![Tokens per forward of rollouts](rollout_speed.png)",
        "Mean over seeds and their range. Prefill and commits need no forwards of their own. SFT "
        "and off-policy distillation have no rollouts.",
        "## Cost of training",
        cost_table(results, known),
        "Response tokens are generated or read ones, counted once however often they are trained "
        "on. Seconds are of one process beside other cells and other work, so they do not compare "
        "speeds; they include the generation of the teacher's responses.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


_FORGETTING = (
    "The corpus holds problems that add and subtract (seen) and none that multiply (unseen); the "
    "AR model that training starts from solves both. Losses are the objective's, nats per token: "
    "seen on the last twentieth of a corpus that is read once, unseen on held-out documents that "
    "multiply, at the end of training. The order of documents and their masks follow from the "
    "seed: the unseen loss of a seed is measured on the same states at all updates and under both "
    "recipes. While it falls it shows learning; its rise above its own minimum shows forgetting. "
    "Accuracies are on held-out problems of each "
    "kind, decoded by diffusion (full attention and shifted, as trained; static, one token a step, "
    "in blocks of {block_size}, which training does not have), and with the same weights read out "
    "autoregressively under a causal mask. Both recipes train attention "
    "at the same rate; by group, everything else has RND1's ratio to it (1e-8 / 3e-4)."
    " Both kinds have {problems} problems each, {teachers} for the AR teacher."
)


def _setup(study: dict[str, Any]) -> str:
    sizes, results = study["sizes"], study["cells"]
    commits = ", ".join(sorted({result["commit"] for result in results}))
    dates = sorted({result["date"] for result in results})
    span = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else ""
    software = ", ".join(f"{name} {number}" for name, number in study["versions"].items())
    machines = "; ".join(
        sorted({"{cpu}, {cores} cores".format(**result["machine"]) for result in results})
    )
    hours = sum(result["seconds"] for result in results) / 3600
    return "\n".join(
        [
            f"- {sizes['seeds']} seeds a recipe, or as many as n says.",
            "- Every recipe sees the same prompts equally often in equally many updates, with the "
            "same batch size and learning rates; not the long run and continual pretraining (see "
            "the last table).",
            f"- {sizes['heldout']} held-out problems, greedy, the same for all: the binomial "
            f"standard error of one accuracy is at most {_largest_error(sizes['heldout']):.1f} "
            "points. tok/fwd counts response tokens and forwards that draw tokens.",
            f"- {machines}, no GPU used; {software}; commit {commits}; {span}; "
            f"{hours:.1f} core hours.",
        ]
    )


def _largest_error(num_problems: int) -> float:
    return 100 * (0.25 / num_problems) ** 0.5
