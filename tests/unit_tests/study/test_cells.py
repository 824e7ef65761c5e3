"""Cells are run once, and a failed cell does not affect the others."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks.environment import REPOSITORY
from benchmarks.study import cells, runner
from benchmarks.study.cells import (
    CURVE_POINTS,
    GOLDEN_LOSSES,
    Cell,
    all_cells,
    finished_result,
    restore_results,
    result_path,
    training_summary,
    write_result,
)
from benchmarks.study.recipes import Sizes
from benchmarks.study.report import published_results
from benchmarks.study.runner import CellFailed, Folders, run_cells

SIZES = Sizes(seeds=2, rollouts=2, best_rollouts=3, heldout=4)
CELLS = {cell.name: cell for cell in all_cells(SIZES)}
RATES = {"accuracy": 0.5, "tokens_per_forward": 2.0}


def metrics(steps: int) -> str:
    lines = [
        {
            "step": step,
            "loss": 1 / step,
            "response_tokens_total": 10 * step,
            "trained_tokens_total": 20 * step,
            "flops_total": 160 * step,
            "response_length": 10.0,
            "tokens_per_forward": None,
            "time": {"rollout": 0.25, "student": 0.5},
        }
        for step in range(1, steps + 1)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


class Scripts:
    """Stands in for the processes of a cell: notes what ran, and fails where told to."""

    def __init__(self, failing: str = "") -> None:
        self.failing, self.trained, self.evaluated = failing, list[str](), list[str]()
        self.loaded = dict[str, str]()

    def __call__(self, log: Path, script: str, *arguments: object) -> None:
        cell = log.stem
        if cell == self.failing:
            raise CellFailed(f"{script} ended with status 1, see {log}")
        if script == "pretrain_opdlm.py":
            [configuration] = [Path(str(value)) for value in arguments[1:]]
            options = yaml.safe_load(configuration.read_text())
            run = Path(options["save"])
            self.trained.append(run.name)
            self.loaded[run.name] = Path(options.get("load", "")).name
            with (run / "metrics.jsonl").open("a") as file:  # a run that goes on keeps its lines
                file.write(metrics(6))
        else:
            self.evaluated.append(cell)
            output = Path(str(arguments[arguments.index("--output") + 1]))
            settings = str(arguments[arguments.index("--settings") + 1]).split(",")
            names = [setting.replace(":", "_") for setting in settings]
            output.write_text(json.dumps({"settings": dict.fromkeys(names, RATES)}))


def chosen(*names: str) -> list[Cell]:
    return [CELLS[name] for name in names]


def test_a_cell_has_a_name_of_its_own() -> None:
    assert len(CELLS) == len(all_cells(SIZES))
    assert {"teacher-seed1", "opdlm-seed1", "opdlm-seed2", "best-seed1"} <= set(CELLS)


def test_only_a_result_of_the_present_specification_counts(tmp_path: Path) -> None:
    cell = CELLS["opdlm-seed1"]
    assert finished_result(tmp_path, cell) is None
    write_result(tmp_path, cell, cell.specification(), {"seconds": 1.0})
    finished = finished_result(tmp_path, cell)
    assert finished is not None
    assert (finished["recipe"], finished["seed"], finished["seconds"]) == ("opdlm", 1, 1.0)
    longer = {cell.name: cell for cell in all_cells(Sizes(seeds=2, rollouts=3))}
    assert finished_result(tmp_path, longer[cell.name]) is None
    more_heldout = Cell(cell.recipe, cell.seed, cell.num_heldout + 1)
    assert finished_result(tmp_path, more_heldout) is None
    assert [file.name for file in tmp_path.iterdir()] == ["opdlm-seed1.json"]


def test_a_changed_method_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = json.loads((REPOSITORY / GOLDEN_LOSSES).read_text())
    for names, stale in ((["sft dense"], {"sft-seed1"}), (list(golden), set(CELLS))):
        changed = {name: [] if name in names else losses for name, losses in golden.items()}
        path = tmp_path / "golden.json"
        path.write_text(json.dumps(changed))
        before = {name: cell.specification() for name, cell in CELLS.items()}
        monkeypatch.setattr(cells, "GOLDEN_LOSSES", str(path))
        cells._golden_digest.cache_clear()
        after = {name: cell.specification() for name, cell in CELLS.items()}
        monkeypatch.undo()
        cells._golden_digest.cache_clear()
        assert {name for name in CELLS if before[name] != after[name]} >= stale
        assert ("opdlm-seed1" in stale) == (before["opdlm-seed1"] != after["opdlm-seed1"])


def test_published_results_count_as_finished(tmp_path: Path) -> None:
    cell, other = CELLS["opdlm-seed1"], CELLS["opdlm-seed2"]
    write_result(tmp_path, cell, cell.specification(), {"seconds": 1.0})
    published = finished_result(tmp_path, cell)
    assert published is not None
    elsewhere = tmp_path / "elsewhere"
    restore_results([published], [cell, other], elsewhere)
    assert finished_result(elsewhere, cell) == published
    assert finished_result(elsewhere, other) is None
    restore_results([{**published, "seconds": 2.0}], [cell, other], elsewhere)
    assert finished_result(elsewhere, cell) == published


def test_the_published_study_is_run_again_only_where_its_report_says_so(tmp_path: Path) -> None:
    study, published = all_cells(Sizes()), REPOSITORY / "benchmarks/results/study"
    restore_results(published_results(published), study, tmp_path)
    again = {
        f"{cell.recipe.name} seed {cell.seed}"
        for cell in study
        if finished_result(tmp_path, cell) is None
    }
    report = (published / "details.md").read_text()
    said = re.search(r"^\*\*Of an earlier version\.\*\* .* again: (.*)\.$", report, re.MULTILINE)
    missing = re.search(r"^\*\*Incomplete\.\*\* Missing cells: (.*)\.$", report, re.MULTILINE)
    named = [names[1].split(", ") for names in (said, missing) if names]
    assert again == {name for names in named for name in names}


def test_published_results_replace_those_of_other_sizes(tmp_path: Path) -> None:
    cell = CELLS["opdlm-seed1"]
    write_result(tmp_path, cell, cell.specification(), {"seconds": 1.0})
    published = finished_result(tmp_path, cell)
    assert published is not None
    shorter = Cell(cell.recipe, cell.seed, cell.num_heldout - 1)
    write_result(tmp_path, cell, shorter.specification(), {"seconds": 0.1})
    assert finished_result(tmp_path, cell) is None
    restore_results([published], [cell], tmp_path)
    assert finished_result(tmp_path, cell) == published
    restore_results([published], [shorter], tmp_path)
    assert finished_result(tmp_path, shorter) is None


def test_finished_cells_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders, scripts = Folders(tmp_path), Scripts()
    monkeypatch.setattr(runner, "_call", scripts)
    folders.results.mkdir()
    finished = CELLS["sft-seed1"]
    write_result(folders.results, finished, finished.specification(), {"seconds": 1.0})
    kept = result_path(folders.results, CELLS["sft-seed1"]).read_bytes()

    assert run_cells(chosen("sft-seed1", "sft-seed2", "teacher-seed1"), folders, jobs=2) == []
    assert scripts.trained == ["sft-seed2"]
    assert set(scripts.evaluated) == {"sft-seed2", "teacher-seed1"}
    assert result_path(folders.results, CELLS["sft-seed1"]).read_bytes() == kept
    result = finished_result(folders.results, CELLS["sft-seed2"])
    assert result is not None
    assert result["training"]["updates"] == 6
    assert result["evaluations"]["block_4"]["dynamic_0.9"] == RATES

    assert not folders.run(CELLS["sft-seed2"].recipe, 2).exists()  # nothing starts from it

    again = Scripts()
    monkeypatch.setattr(runner, "_call", again)
    assert run_cells(chosen("sft-seed1", "sft-seed2", "teacher-seed1"), folders, jobs=1) == []
    assert again.trained == again.evaluated == []


def test_a_failed_cell_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = Folders(tmp_path)
    monkeypatch.setattr(runner, "_call", Scripts(failing="opdlm-seed1"))
    some = chosen("opdlm-seed1", "opdlm-seed2", "sft-seed1")
    assert run_cells(some, folders, jobs=1) == chosen("opdlm-seed1")
    assert finished_result(folders.results, CELLS["opdlm-seed1"]) is None
    assert finished_result(folders.results, CELLS["opdlm-seed2"]) is not None
    assert finished_result(folders.results, CELLS["sft-seed1"]) is not None
    printed = capsys.readouterr().out
    assert "[3/3]" in printed
    assert "opdlm-seed1: FAILED" in printed

    monkeypatch.setattr(runner, "_call", Scripts())
    assert run_cells(some, folders, jobs=1) == []
    assert finished_result(folders.results, CELLS["opdlm-seed1"]) is not None


def test_a_cell_trains_what_it_starts_from_and_an_interrupted_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, scripts = Folders(tmp_path), Scripts()
    monkeypatch.setattr(runner, "_call", scripts)
    assert run_cells(chosen("d_opsd-seed1"), folders, jobs=1) == []
    assert scripts.trained == ["opdlm_grown-seed1", "d_opsd-seed1"]
    assert scripts.loaded["d_opsd-seed1"] == "opdlm_grown-seed1"
    source = folders.run(CELLS["opdlm_grown-seed1"].recipe, 1)
    assert len((source / "metrics.jsonl").read_text().splitlines()) == 6

    assert run_cells(chosen("opdlm_grown-seed1"), folders, jobs=1) == []  # the run that is there
    assert len((source / "metrics.jsonl").read_text().splitlines()) == 12
    (source / "specification.json").write_text("of another recipe")
    result_path(folders.results, CELLS["opdlm_grown-seed1"]).unlink()
    assert run_cells(chosen("opdlm_grown-seed1"), folders, jobs=1) == []
    assert len((source / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_changed_source_makes_what_starts_from_it_run_again(tmp_path: Path) -> None:
    cell = CELLS["d_opsd-seed1"]
    write_result(tmp_path, cell, cell.specification(), {"seconds": 1.0})
    assert finished_result(tmp_path, cell) is not None
    source = replace(cell.recipe.models["load"], options={"lr": 1.0})
    changed = replace(cell, recipe=replace(cell.recipe, models={"load": source}))
    assert finished_result(tmp_path, changed) is None


@pytest.mark.parametrize("script", ["pretrain_opdlm.py", "tools/evaluate.py"])
def test_a_process_that_fails_is_reported_with_its_log(script: str, tmp_path: Path) -> None:
    log = tmp_path / "cell.log"
    with pytest.raises(CellFailed, match=r"status 2, see .*cell\.log"):
        runner._call(log, script, "--no-such-option", "1")
    assert "--no-such-option" in log.read_text()


@pytest.mark.parametrize("steps", [1, 7, CURVE_POINTS, CURVE_POINTS + 1, 1000])
def test_curves_are_thinned_by_averaging(steps: int, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(metrics(steps))
    summary = training_summary(tmp_path / "metrics.jsonl")
    assert (summary["updates"], summary["response_tokens"]) == (steps, 10 * steps)
    assert (summary["trained_tokens"], summary["flops"]) == (20 * steps, 160 * steps)
    curves = summary["curves"]
    assert "tokens_per_forward" not in curves  # this objective has none
    assert len(curves["step"]) == len(curves["loss"]) <= CURVE_POINTS
    assert curves["step"][-1] == steps
    lengths = [
        end - start for start, end in zip([0, *curves["step"]], curves["step"], strict=False)
    ]
    total = sum(length * loss for length, loss in zip(lengths, curves["loss"], strict=True))
    assert total == pytest.approx(sum(1 / step for step in range(1, steps + 1)), rel=1e-2)


def test_the_validation_loss_keeps_its_steps(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in metrics(6).splitlines()]
    for line in lines:
        line["validation_loss"] = 2.0 / line["step"] if line["step"] % 3 == 0 else None
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = training_summary(path)["curves"]
    assert (curves["validation_step"], curves["validation_loss"]) == ([3, 6], [0.66667, 0.33333])
