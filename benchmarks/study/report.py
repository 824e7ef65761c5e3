"""results.json from the cells, and report.md, details.md and plots from results.json.

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
from benchmarks.study.details import render_details
from benchmarks.study.findings import LEARNING, findings
from benchmarks.study.plots import plot_accuracy_against_speed, plot_forgetting, plot_rollout_speed
from benchmarks.study.recipes import Recipe, Sizes, recipes
from benchmarks.study.statistics import Result
from benchmarks.study.tables import overview_table
from megatron_dlm.errors import bad_value
from megatron_dlm.output_file import write_file

RESULTS, REPORT, DETAILS = "results.json", "report.md", "details.md"


def collect(cells: Sequence[Cell], folder: Path, output: Path, sizes: Sizes) -> None:
    """Write results.json: what is measured of a study, and on what.

    A cell that is not finished keeps its published result, of an earlier version.

    Args:
        cells: The whole study.
        folder: Of the cells' results.
        output: Folder to write into.
        sizes: Of the study.
    """
    output.mkdir(parents=True, exist_ok=True)
    published = {(cell["recipe"], cell["seed"]): cell for cell in published_results(output)}
    measured = [
        finished_result(folder, cell) or published.get((cell.recipe.name, cell.seed))
        for cell in cells
    ]
    study = {
        "versions": versions(),
        "sizes": asdict(sizes),
        "expected": Counter(cell.recipe.name for cell in cells),
        "cells": [result for result in measured if result is not None],
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
    """Write report.md, details.md and their plots from results.json.

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
    write_file(output / DETAILS, render_details(study, known, outdated))


def render(study: dict[str, Any], known: Sequence[Recipe], outdated: Sequence[str]) -> str:
    """The page of findings; see `render_details` for the arguments."""
    results: list[Result] = study["cells"]
    measured = {result["recipe"] for result in results}
    absent = [recipe.title for recipe in known if recipe.name not in measured]
    sections = [
        "# The objectives side by side on the tiny model",
        "Written by `make study` from [results.json](results.json): all numbers are computed. "
        "Settings, spreads, costs, plots and the papers' claims one by one are in the "
        "[details](details.md).",
        "## Findings",
        "\n".join(f"- {finding}" for finding in findings(results)),
        "## All recipes",
        overview_table(results, known, outdated),
        "Of each seed, on held-out problems, greedy, at the block size of training; AR models are "
        "decoded from left to right. Tokens a forward are those of dynamic 0.9. A run has left the "
        f"plateau when its loss on rollouts stays below {LEARNING:g} nats per token; before that "
        "its rollouts are noise.",
        "† Measured before the recipe or the golden losses of its objective changed, so that "
        "`make study` runs some of its cells again; the findings have these numbers too."
        if outdated
        else "",
        f"Not measured yet: {'; '.join(absent)}." if absent else "",
        "![Accuracy against tokens per forward](accuracy_vs_speed.png)",
        "## Measured how",
        _setup(study),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


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
            "- Every recipe sees the same prompts equally often in equally many updates, with the "
            "same batch size and learning rates, where its row does not say otherwise.",
            f"- {sizes['heldout']} held-out problems, greedy, the same for all: the standard "
            f"error of one accuracy is at most {_largest_error(sizes['heldout']):.1f} points.",
            f"- {machines}, no GPU used; {software}; commit {commits}; {span}; "
            f"{hours:.1f} hours of one process each, beside other work.",
        ]
    )


def _largest_error(num_problems: int) -> float:
    return 100 * (0.25 / num_problems) ** 0.5
