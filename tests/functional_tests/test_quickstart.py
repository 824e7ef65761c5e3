"""The quickstart, end to end as a user starts it, on a short training run."""

import json
import os
import subprocess
import sys
from pathlib import Path

from huggingface_hub import ModelCard
from safetensors import safe_open

from tests.tiny import REPOSITORY

SETTINGS = ("static", "dynamic_0.9", "dynamic_0.7")


def test_short_quickstart(tmp_path: Path) -> None:
    run = tmp_path / "quickstart"
    environment = dict(
        os.environ,
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        PYTHONPATH=str(REPOSITORY),
        QUICKSTART_RUN=str(run),
        MAX_EXAMPLES="12",
    )
    command = ["bash", "examples/tiny/quickstart.sh", "--num-rollouts", "1"]
    command += ["--rollout-batch-size", "48", "--eval-num-prompts", "8", "--lr-warmup-iters", "5"]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["teacher_accuracy"] >= 0.95
    for stage in ("before", "after"):
        assert set(summary[stage]) == set(SETTINGS)
        for rates in summary[stage].values():
            assert 0 <= rates["accuracy"] <= 1
            assert rates["tokens_per_forward"] > 0
    assert summary["before"]["static"]["accuracy"] <= 0.1
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == summary["optimizer_steps"]
    assert metrics[-1]["response_tokens_total"] == summary["response_tokens_total"]
    keys = {"step", "rollout", "loss", "grad_norm", "lr", "supervised_tokens"}
    keys |= {"response_tokens_total", "tokens_per_forward", "eos_rate", "time", "throughput"}
    assert all(keys <= line.keys() for line in metrics)
    phases = {"rollout", "teacher", "student", "optimizer", "validation"}
    assert set(metrics[0]["time"]) == phases
    assert 0 < summary["throughput"]["mfu"] < 1
    assert 0 < summary["throughput"]["rollout_floor_share"] < 1
    assert (run / "report.png").stat().st_size > 10_000
    assert list((run / "tensorboard").iterdir())
    assert "block_size: 4" in (run / "config.yaml").read_text()
    assert json.loads((run / "hf" / "config.json").read_text())["model_type"] == "sdar"
    card = ModelCard.load(run / "hf" / "README.md")
    scores = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert scores == {
        f"accuracy, {setting}": round(summary["after"][setting]["accuracy"], 4)
        for setting in summary["after"]
    }
    assert f"| updates | {summary['optimizer_steps']} |" in card.content
    assert "on-policy distillation" in card.content
    with safe_open(run / "hf" / "model.safetensors", "pt") as file:
        assert "model.embed_tokens.weight" in file.keys()  # noqa: SIM118
    assert "Answer:" in result.stdout
    assert "after conversion" in result.stdout
