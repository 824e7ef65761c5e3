"""tools/critical_batch_size.py: real branches, resumed, compared."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dlm.entry import PREEMPTED_STATUS
from megatron_dlm.training.run_folder import latest_iteration
from tests.faults.runs import RunningProcess, events, metrics
from tests.functional_tests.entry_points import CRITICAL_BATCH_SIZE, Call, lines
from tests.tiny import run_config, save_random_model, write_data


def critical(study: Path, tolerance: float) -> dict[str, Any]:
    """What the summary has to say of the validation losses in results.jsonl."""
    losses = {r["batch_size"]: r["validation_loss"] for r in lines(study / "results.jsonl")}
    best = min(losses.values())
    largest = max(size for size, loss in losses.items() if (loss - best) / best <= tolerance)
    return {
        "critical_batch_size": largest,
        "critical_batch_tokens": largest * 16,
        "is_lower_bound": largest == max(losses),
        "tolerance": tolerance,
    }


def study_of(folder: Path, token_budget: int) -> list[str | Path]:
    """Arguments of a study of two batch sizes in `folder`/study."""
    write_data(folder)
    model = save_random_model(folder / "model")
    config = run_config(
        folder,
        model,
        objective="scp",
        seq_length=16,
        eval_iters=2,
        eval_interval=1,
        valid_data_path=str(folder / "corpus_heldout"),
    )
    recipe = folder / "recipe.yaml"
    values = {name: value for name, value in config.to_dict().items() if value is not None}
    recipe.write_text(yaml.safe_dump(values))
    arguments = ["--training-config", recipe, "--load", model, "--save", folder / "study"]
    return [*arguments, "--batch-sizes", "4,8", "--token-budget", str(token_budget)]


def test_branches_are_trained_once_and_compared(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, study = study_of(tmp_path, 4 * 8 * 16), tmp_path / "study"
    first = call(CRITICAL_BATCH_SIZE, *arguments)
    assert first.status == 0, first.stderr
    results = lines(study / "results.jsonl")
    assert [(r["batch_size"], r["train_iters"], r["tokens"]) for r in results] == [
        (4, 8, 512),
        (8, 4, 512),
    ]
    recorded = [lines(study / f"batch_{size}" / "metrics.jsonl") for size in (4, 8)]
    for result, branch in zip(results, recorded, strict=True):
        assert len(branch) == result["train_iters"]
        assert result["validation_loss"] == branch[-1]["validation_loss"]
        assert branch[-1]["response_tokens_total"] == 512
    assert recorded[1][0]["lr"]["default"] == pytest.approx(
        2**0.5 * recorded[0][0]["lr"]["default"]
    )
    assert critical(study, tolerance=0.01) == json.loads((study / "summary.json").read_text())
    assert (study / "critical_batch_size.png").stat().st_size > 1000

    def no_run(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a finished branch was started again")

    monkeypatch.setattr("megatron_dlm.commands.critical_batch_size.subprocess.Popen", no_run)
    assert call(CRITICAL_BATCH_SIZE, *arguments).status == 0
    assert lines(study / "results.jsonl") == results

    # The small batch the better one, by a tenth.
    recorded[0][-1]["validation_loss"] = 0.9 * results[1]["validation_loss"]
    text = "".join(json.dumps(line) + "\n" for line in recorded[0])
    (study / "batch_4" / "metrics.jsonl").write_text(text)
    for tolerance, size in ((0.0, 4), (0.1, 4), (0.12, 8)):
        assert call(CRITICAL_BATCH_SIZE, *arguments, "--tolerance", tolerance).status == 0
        summary = json.loads((study / "summary.json").read_text())
        assert summary == critical(study, tolerance)
        assert summary["critical_batch_size"] == size
    call(CRITICAL_BATCH_SIZE, *arguments, "--options", '{"lr": 0.5}').check_error(
        "batch_4", "other settings"
    )


def test_a_stopped_study_has_saved_its_branch(tmp_path: Path) -> None:
    command = [sys.executable, CRITICAL_BATCH_SIZE, *study_of(tmp_path, 4 * 8 * 16 * 400)]
    study, branch = RunningProcess(command, tmp_path / "log"), tmp_path / "study" / "batch_4"
    study.wait_until(lambda: len(metrics(branch)) > 1)
    study.send(signal.SIGINT)
    assert study.wait() == PREEMPTED_STATUS, study.output
    assert "the same command goes on" in study.output
    assert events(branch)[-1] == "stopped"
    assert latest_iteration(branch) == len(metrics(branch))


def test_arguments_that_cannot_work(tmp_path: Path, call: Call) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("objective: scp\ndata_path: c\nseq_length: 16\n")
    common = ("--training-config", recipe, "--save", tmp_path / "s", "--token-budget", 1280)
    call(CRITICAL_BATCH_SIZE).check_error("--training-config = None")
    call(CRITICAL_BATCH_SIZE, *common).check_error("--load = None")
    loaded = (*common, "--load", "model")
    call(CRITICAL_BATCH_SIZE, *loaded).check_error("--batch-sizes = []")
    call(CRITICAL_BATCH_SIZE, *loaded, "--batch-sizes", "3").check_error("--token-budget = 1280")
    call(CRITICAL_BATCH_SIZE, *loaded, "--tolerance", -1).check_error("--tolerance = -1.0")
    call(CRITICAL_BATCH_SIZE, *loaded, "--options", '{"blok": 1}').check_error("'blok'")
