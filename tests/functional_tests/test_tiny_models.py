"""The committed tiny models: their answers, and a short conversion under expert parallelism."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dlm.data.arithmetic import write_examples
from tests.tiny import REPOSITORY

TINY = REPOSITORY / "examples" / "tiny"


def _python(*command: str | Path) -> None:
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY))
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("model", ["qwen3", "qwen3_moe"])
def test_held_out_problems_are_answered_exactly(tmp_path: Path, model: str) -> None:
    data, output = tmp_path / "heldout.jsonl", tmp_path / "results.json"
    write_examples(data, "heldout", 3, 500)
    command = ("tools/evaluate.py", "--load", TINY / model, "--data", data, "--output", output)
    _python(*command, "--settings", "autoregressive", "--max-response-length", "40")
    results = json.loads(output.read_text())
    assert results["num_examples"] == 500
    assert results["settings"]["autoregressive"]["accuracy"] >= 0.95
    assert (TINY / model / "model.safetensors").stat().st_size < 8_000_000


def test_short_conversion_of_the_mixture_of_experts_under_ep2(tmp_path: Path) -> None:
    prompts, run = tmp_path / "prompts.jsonl", tmp_path / "run"
    write_examples(prompts, "train", 2, 200)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    config = ("--config", "examples/tiny/opdlm_moe.yaml", "--num-rollouts", "4")
    _python(*torchrun, "pretrain_opdlm.py", *config, "--prompts", prompts, "--save", run)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 4 * 16
    early, late = (sum(line["loss"] for line in lines) / 8 for lines in (metrics[:8], metrics[-8:]))
    assert late < 0.7 * early
