"""Run cells as separate processes, several at a time; a failed cell does not stop the others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

import yaml

from benchmarks.environment import REPOSITORY, commit, machine
from benchmarks.study.cells import (
    Cell,
    finished_result,
    trained_by,
    training_summary,
    write_result,
)
from benchmarks.study.problems import heldout_path, training_data
from benchmarks.study.recipes import (
    TEACHER,
    Evaluation,
    Recipe,
    max_response_length,
)
from megatron_dlm.output_file import write_file

EVALUATION_UPDATES = 60
"""Updates that take about as long as one evaluation: the longest cells run first."""
_LOCKS = defaultdict[Path, Lock](Lock)
"""Of the run folders: several cells may start from one model at once."""


@dataclass(frozen=True)
class Folders:
    """Folders of a study.

    Attributes:
        work: The work folder, which contains the others.
    """

    work: Path

    @property
    def data(self) -> Path:
        """Prompts and held-out problems."""
        return self.work / "data"

    @property
    def results(self) -> Path:
        """One JSON file per finished cell."""
        return self.work / "cells"

    def run(self, recipe: Recipe, seed: int) -> Path:
        """The run folder of a recipe under a seed."""
        return self.work / "runs" / f"{recipe.name}-seed{seed}"

    def log(self, cell: Cell) -> Path:
        """The log of a cell, beside its run folder."""
        return self.work / "runs" / f"{cell.name}.log"


def run_cells(cells: Sequence[Cell], folders: Folders, jobs: int) -> list[Cell]:
    """Run the cells that are not finished, the longest first.

    Args:
        cells: The whole study, or a part of it.
        folders: Of the study; the data must exist.
        jobs: Cells at a time, one process and one core each.

    Returns:
        The cells that failed.
    """
    folders.results.mkdir(parents=True, exist_ok=True)
    todo = [cell for cell in cells if finished_result(folders.results, cell) is None]
    print(f"{len(cells) - len(todo)} of {len(cells)} cells are finished, {len(todo)} to run")
    failed = []
    pool = ThreadPoolExecutor(jobs)
    try:
        started = {
            pool.submit(_run_cell, cell, folders): cell
            for cell in sorted(todo, key=_cost, reverse=True)
        }
        for number, future in enumerate(as_completed(started), start=1):
            cell = started[future]
            try:
                summary = future.result()
            except CellFailed as error:
                failed.append(cell)
                summary = f"FAILED: {error}"
            print(f"[{number}/{len(todo)}] {cell.name}: {summary}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


class CellFailed(Exception):
    """A process of a cell ended with an error, which its log holds."""


def _run_cell(cell: Cell, folders: Folders) -> str:
    """Train, evaluate and write the result; returns its summary in one line."""
    log = folders.log(cell)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    specification = cell.specification()
    measured: dict[str, Any] = {
        "machine": machine(),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    recipe, load = cell.recipe, Path(TEACHER)
    if recipe.example is not None:
        load = _trained_model(recipe, cell.seed, folders, log)
        measured["training"] = training_summary(load / "metrics.jsonl")
    started, seconds = time.perf_counter(), measured.get("training", {}).get("seconds", 0.0)
    measured["evaluations"] = {
        evaluation.name: _evaluate(log, load, evaluation, cell, folders)
        for evaluation in recipe.evaluations
    }
    measured["seconds"] = round(seconds + time.perf_counter() - started, 1)
    write_result(folders.results, cell, specification, measured)
    if recipe.example is not None and not recipe.kept:
        shutil.rmtree(load)
    return _headline(measured)


def _trained_model(recipe: Recipe, seed: int, folders: Folders, log: Path) -> Path:
    """Train a recipe, after the models that it starts from; returns the run folder.

    An interrupted run of the same specification goes on; of a finished one nothing is left to do.
    """
    run, specification = folders.run(recipe, seed), json.dumps(trained_by(recipe, seed), indent=1)
    with _LOCKS[run]:
        paths = training_data(folders.data, recipe) | {
            option: _trained_model(model, seed, folders, log)
            for option, model in recipe.models.items()
        }
        begun = run / "specification.json"
        if not begun.is_file() or begun.read_text(encoding="utf-8") != specification:
            shutil.rmtree(run, ignore_errors=True)
            run.mkdir(parents=True)
            write_file(begun, specification)
        texts = {name: str(path) for name, path in {**paths, "save": run}.items()}
        options = {**(recipe.training_options(seed) or {}), **texts}
        write_file(run / "recipe.yaml", yaml.safe_dump(options))
        _call(log, "pretrain_opdlm.py", "--config", run / "recipe.yaml")
    return run


def _evaluate(
    log: Path, load: str | Path, evaluation: Evaluation, cell: Cell, folders: Folders
) -> dict[str, Any]:
    """The rates of each setting."""
    output = folders.log(cell).with_suffix(f".{evaluation.name}.json")
    arguments: list[object] = ["--load", load, "--output", output]
    arguments += ["--data", heldout_path(folders.data, evaluation.data)]
    arguments += ["--max-examples", cell.num_heldout]
    arguments += ["--max-response-length", max_response_length()]
    arguments += ["--settings", ",".join(evaluation.settings)]
    if evaluation.block_size is not None:
        arguments += ["--block-size", evaluation.block_size]
    _call(log, "tools/evaluate.py", *arguments)
    settings = json.loads(output.read_text())["settings"]
    assert isinstance(settings, dict)
    return settings


def _call(log: Path, script: str, *arguments: object) -> None:
    """Run a script of the repository on one core; its output goes to the log.

    Raises:
        CellFailed: It ended with an error.
    """
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "TOKENIZERS_PARALLELISM": "false",
    }
    with log.open("a") as output:
        done = subprocess.run(
            [sys.executable, script, *map(str, arguments)],
            cwd=REPOSITORY,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        raise CellFailed(f"{script} ended with status {done.returncode}, see {log}")


def _headline(measured: dict[str, Any]) -> str:
    """The first setting of each evaluation, for the person watching."""
    parts = []
    for evaluation, settings in measured["evaluations"].items():
        setting, rates = next(iter(settings.items()))
        label = setting if setting == evaluation else f"{evaluation} {setting}"
        parts.append(f"{label} {rates['accuracy']:.1%}")
    return ", ".join(parts)


def _cost(cell: Cell) -> int:
    """About how long a cell takes, in optimizer updates."""
    updates = 0 if cell.recipe.example is None else cell.recipe.updates
    return updates + EVALUATION_UPDATES * len(cell.recipe.evaluations)
