"""The code of a GPU runs whole on tensors without data, and asks the device for little.

Budgets are counts: they hold on any machine. Each shape runs in a fresh process, as the CUDA path
is chosen once in a process.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import megatron.core
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
STEPS = ("prefill step", "rollout step", "step of a new block")


COUNT = """if True:
    import json, sys
    from dataclasses import asdict
    from benchmarks import counts, growth
    counts.main(["--output", sys.argv[1]])
    found = [{**asdict(g), "last": g.last_exponent} for g in growth.on_device(points=2)]
    json.dump(found, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What `benchmarks.counts` and `benchmarks.growth` count on the device."""
    folder = tmp_path_factory.mktemp("counts")
    counts, growth = folder / "counts.json", folder / "growth.json"
    subprocess.run([sys.executable, "-c", COUNT, str(counts), str(growth)], cwd=ROOT, check=True)
    return counts, growth


@pytest.fixture(scope="module")
def counts(files: tuple[Path, Path]) -> dict[str, Any]:
    """Phases of an iteration by shape."""
    counts: dict[str, Any] = json.loads(files[0].read_text())["counts"]
    return counts


def test_no_cost_of_the_device_grows_faster_than_it_has_to(files: tuple[Path, Path]) -> None:
    growths = json.loads(files[1].read_text())
    assert {growth["axis"] for growth in growths} == {"sequence", "vocabulary", "experts", "ranks"}
    for growth in growths:
        assert growth["last"] <= growth["nature"] + 0.05, growth
    kernels = {g["axis"]: g["last"] for g in growths if g["cost"].startswith("kernels of a step")}
    assert kernels == {"experts": 0.0, "ranks": 0.0}


@pytest.mark.parametrize(("shape", "most"), [("qwen3_0.6b", 27), ("qwen3_30b_a3b", 46)])
@pytest.mark.parametrize("step", STEPS)
def test_a_layer_of_a_rollout_is_few_kernels(
    counts: dict[str, Any], shape: str, most: int, step: str
) -> None:
    """The budget is 45 kernels a dense layer, 60 with experts, here split over 8 ranks."""
    layer = counts[shape][step]["layer"]
    exchanges = shape == "qwen3_30b_a3b" and step == "prefill step"  # too many tokens to gather
    assert 0 < layer["kernels"] <= most + 12 * exchanges
    assert layer["copies_to_device"] == layer["synchronisations"] == 0
    assert layer["copies_to_host"] == exchanges


@pytest.mark.parametrize(("shape", "ranks"), [("qwen3_0.6b", 1), ("qwen3_30b_a3b", 8)])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_waits_once_for_its_tokens(
    counts: dict[str, Any], shape: str, ranks: int, step: str
) -> None:
    rest = counts[shape][step]["rest"]
    agreements = int(ranks > 1)  # how long the longest row is
    assert rest["copies_to_host"] == 1 + agreements  # what was committed, and who is finished
    assert rest["synchronisations"] == 0
    assert rest["blocking_copies_to_device"] == agreements
    assert rest["copies_after_products"] == 0


def test_a_replayed_step_launches_a_graph_and_the_draws(counts: dict[str, Any]) -> None:
    """To capture it, the host read no value and gave none: else it would have raised."""
    step = counts["qwen3_0.6b"]["replayed step"]
    assert set(step["layer"].values()) == {0}
    assert step["rest_by_name"]["graph"] == 1
    assert step["rest"]["kernels"] <= 150
    assert step["rest"]["copies_to_host"] == 1
    assert step["rest"]["blocking_copies_to_device"] == step["rest"]["synchronisations"] == 0


@pytest.mark.parametrize("shape", ["qwen3_0.6b", "qwen3_30b_a3b"])
def test_an_update_waits_for_its_numbers_only(counts: dict[str, Any], shape: str) -> None:
    # One copy of teacher and update is the layout, for FlexAttention's block mask; that of a layer
    # of experts says how many tokens ranks exchange, that of a teacher how long its rows are, and
    # that of the optimizer loss, norm and all that is reported of the update.
    experts = shape == "qwen3_30b_a3b"
    layers = 48 * experts
    # 0.19 of Megatron-Core waits once less in the update and twice more in the optimizer.
    update, optimizer = (2, 2) if megatron.core.__version__.startswith("0.16") else (1, 4)
    for phase, copies, waits in (
        ("teacher", 1 + experts, 0),
        ("update", 1 + layers, update),
        ("optimizer", 1, optimizer),
    ):
        assert counts[shape][phase]["model"]["copies_to_host"] == copies, phase
        assert counts[shape][phase]["model"]["synchronisations"] == waits, phase


@pytest.mark.parametrize(
    ("shape", "weights"),
    [
        # Attention and a feed-forward network, or the 16 experts of a rank and the router.
        ("qwen3_0.6b", 1024 * (16 + 2 * 8 + 16) * 128 + 3 * 1024 * 3072),
        ("qwen3_30b_a3b", 2048 * ((32 + 2 * 4 + 32) * 128 + 2 * 128) + 16 * 3 * 2048 * 768),
    ],
)
def test_weights_are_read_once_in_a_step(counts: dict[str, Any], shape: str, weights: int) -> None:
    """They are most of what a step of few tokens reads; with experts, 8 ranks send theirs."""
    layer = counts[shape]["rollout step"]["layer"]
    assert 2 * weights < layer["bytes"] < (2 if shape == "qwen3_0.6b" else 2.6) * 2 * weights
