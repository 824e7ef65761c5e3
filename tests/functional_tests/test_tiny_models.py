"""The committed tiny models: their answers, and a short conversion under expert parallelism."""

import json
from pathlib import Path

import pytest

from megatron_dlm.data.arithmetic import write_examples
from tests.functional_tests.entry_points import run_ranks
from tests.tiny import REPOSITORY

TINY = REPOSITORY / "examples" / "tiny"


@pytest.mark.parametrize("model", ["qwen3", "qwen3_moe"])
def test_held_out_problems_are_answered_exactly(tmp_path: Path, model: str) -> None:
    data, output = tmp_path / "heldout.jsonl", tmp_path / "results.json"
    write_examples(data, "heldout", 3, 120)
    command = ("evaluate", "--load", TINY / model, "--data", data, "--output", output)
    outcome = run_ranks(1, *command, "--settings", "autoregressive", "--max-response-length", 40)
    assert outcome.status == 0, outcome.stderr
    results = json.loads(output.read_text())
    assert results["num_examples"] == 120
    assert results["settings"]["autoregressive"]["accuracy"] >= 0.95
    assert (TINY / model / "model.safetensors").stat().st_size < 8_000_000


def test_short_conversion_of_the_mixture_of_experts_under_ep2(tmp_path: Path) -> None:
    prompts, run = tmp_path / "prompts.jsonl", tmp_path / "run"
    write_examples(prompts, "train", 2, 200)
    length = ("--num-rollouts", 2, "--lr-warmup-iters", 8)
    data = ("--prompts", prompts, "--save", run)
    outcome = run_ranks(2, "train", "--config", TINY / "opdlm_moe.yaml", *length, *data)
    assert outcome.status == 0, outcome.stderr
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 * 16
    early, late = (sum(line["loss"] for line in lines) / 8 for lines in (metrics[:8], metrics[-8:]))
    assert late < 0.7 * early
