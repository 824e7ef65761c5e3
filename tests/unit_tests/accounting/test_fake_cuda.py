"""The code of a GPU runs whole on tensors without data, and asks the device for little.

Budgets are counts: they hold on any machine. Each shape runs in a fresh process, as the CUDA path
is chosen once in a process.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
STEPS = ("prefill step", "rollout step", "step of a new block")


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Phases of an iteration by shape."""
    file = tmp_path_factory.mktemp("counts") / "counts.json"
    command = [sys.executable, "-m", "benchmarks.counts", "--output", str(file)]
    subprocess.run(command, cwd=ROOT, check=True)
    counts: dict[str, Any] = json.loads(file.read_text())["counts"]
    return counts


@pytest.mark.parametrize(("shape", "most"), [("qwen3_0.6b", 25)])
@pytest.mark.parametrize("step", STEPS)
def test_a_layer_of_a_rollout_is_few_kernels(
    counts: dict[str, Any], shape: str, most: int, step: str
) -> None:
    """The budget is 45 kernels a dense layer, 60 with experts."""
    layer = counts[shape][step]["layer"]
    assert 0 < layer["kernels"] <= most
    assert layer["copies_to_device"] == layer["copies_to_host"] == layer["synchronisations"] == 0


@pytest.mark.parametrize("shape", ["qwen3_0.6b"])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_waits_once_for_its_tokens(counts: dict[str, Any], shape: str, step: str) -> None:
    rest = counts[shape][step]["rest"]
    assert rest["copies_to_host"] == 1  # the drawn tokens
    assert rest["synchronisations"] == 0
    assert rest["blocking_copies_to_device"] == 2  # of the draws, which the budget leaves out
    assert rest["copies_after_products"] == 2  # likewise


@pytest.mark.parametrize("shape", ["qwen3_0.6b"])
def test_an_update_waits_for_its_numbers_only(counts: dict[str, Any], shape: str) -> None:
    # One copy of each kind is the layout, for FlexAttention's block mask.
    for phase, copies, waits in (("teacher", 1, 0), ("update", 2, 2), ("optimizer", 1, 3)):
        assert counts[shape][phase]["model"]["copies_to_host"] == copies, phase
        assert counts[shape][phase]["model"]["synchronisations"] == waits, phase


@pytest.mark.parametrize("shape", ["qwen3_0.6b"])
def test_weights_are_read_once_in_a_step(counts: dict[str, Any], shape: str) -> None:
    """A layer's 15.7 million parameters are most of what a step of few tokens reads."""
    layer = counts[shape]["rollout step"]["layer"]
    weights = 2 * (1024 * (16 + 2 * 8 + 16) * 128 + 3 * 1024 * 3072)
    assert weights < layer["bytes"] < 2 * weights
