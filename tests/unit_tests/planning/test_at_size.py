"""A run starts, trains and would save on any rank of 8, 64 and 512, and plans say what it holds.

Everything is the code of a GPU on tensors without data, in a process of its own (`at_size`):
process groups, models, optimizer, the teacher, a pass of Megatron's schedule, the sharded state.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real_shapes import SHAPES
from megatron_dlm.config import Config
from megatron_dlm.models.architecture import architecture_from_hf
from megatron_dlm.planning.gpus import GPUS
from megatron_dlm.planning.layouts import Layout
from megatron_dlm.planning.memory import MemoryModel, RankMemory
from megatron_dlm.planning.workload import Lengths

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
PROMPT, RESPONSE = 256, 1_024
MOE, DENSE = "qwen3_30b_a3b", "qwen3_8b"
EP8 = {"expert_model_parallel_size": 8}
EP8_PP8 = {**EP8, "pipeline_model_parallel_size": 8, "recompute_granularity": "full"}
TP2_PP2_CP2 = {
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "pipeline_model_parallel_size": 2,
    "context_parallel_size": 2,
    "recompute_granularity": "full",
}
CASES: dict[str, dict[str, Any]] = {
    "30B on 8": {"shape": MOE, "world": 8, "rank": 3, "options": EP8},
    **{
        f"30B on {world}, stage {rank * 8 // world}": {
            "shape": MOE,
            "world": world,
            "rank": rank,
            "options": EP8_PP8,
        }
        for world, ranks in ((64, (5, 40, 60)), (512, (0, 200, 511)))
        for rank in ranks
    },
    "8B, stage 0": {"shape": DENSE, "world": 8, "rank": 1, "options": TP2_PP2_CP2},
    "8B, stage 1": {"shape": DENSE, "world": 8, "rank": 7, "options": TP2_PP2_CP2},
}
"""Every kind of rank: the first stage, one between, the last, which are alike over data-parallel
ranks."""
WITH_ROLLOUT = "30B on 64, stage 0"
CASES[WITH_ROLLOUT] |= {"teaches": True, "rollout": 1}


def full(case: dict[str, Any]) -> dict[str, Any]:
    """A case with a batch of one row for each replica."""
    options = case["options"]
    parts = options.get("tensor_model_parallel_size", 1)
    parts *= options.get("pipeline_model_parallel_size", 1)
    parts *= options.get("context_parallel_size", 1)
    replicas = case["world"] // parts
    batch = {"global_batch_size": replicas, "rollout_batch_size": replicas}
    return {
        **case,
        "prompt": PROMPT,
        "response": RESPONSE,
        "rows": 1,
        "options": {**options, **batch},
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each case holds."""
    folder = tmp_path_factory.mktemp("at_size")
    cases, results = folder / "cases.json", folder / "results.json"
    cases.write_text(json.dumps([full(case) for case in CASES.values()]))
    command = [sys.executable, "-m", "tests.unit_tests.planning.at_size", str(cases), str(results)]
    subprocess.run(command, cwd=ROOT, check=True)
    return dict(zip(CASES, json.loads(results.read_text()), strict=True))


def planned(name: str, response: int = RESPONSE) -> tuple[MemoryModel, Config, Layout, int]:
    case = full(CASES[name])
    config = Config().changed(
        objective="opdlm_off",
        device="cuda",
        bf16=True,
        use_distributed_optimizer=True,
        max_response_length=response,
        **case["options"],
    )
    layout = Layout.of(config, case["world"])
    architecture = architecture_from_hf(SHAPES[case["shape"]])
    model = MemoryModel(config, architecture, architecture, Lengths(PROMPT, response, 2.0))
    ranks_of_stage = layout.gpus // layout.pipeline
    return model, config, layout, case["rank"] // ranks_of_stage


def memory_of(name: str, response: int = RESPONSE) -> RankMemory:
    model, config, layout, stage = planned(name, response)
    return model.of_stage(config, layout, GPUS["h200"], stage)


@pytest.mark.parametrize("name", CASES)
def test_parameters_put_together_are_those_of_the_whole_model(
    measured: dict[str, dict[str, Any]], name: str
) -> None:
    model, _, layout, stage = planned(name)
    parameters = model.parameters(layout, stage)
    assert parameters.all == parameters.trained == measured[name]["parameters"]
    assert parameters.experts == measured[name]["experts"]


@pytest.mark.parametrize("name", CASES)
def test_every_rank_has_its_part_to_save(measured: dict[str, dict[str, Any]], name: str) -> None:
    """Each parameter, and its main weight and two moments if a part of them is this rank's."""
    assert measured[name]["saved"] > 100


@pytest.mark.parametrize("name", CASES)
def test_planned_memory_is_what_the_run_holds(
    measured: dict[str, dict[str, Any]], name: str
) -> None:
    memory, found = memory_of(name), measured[name]
    resident = sum(
        memory.phases["update"][part] for part in ("weights", "teacher", "gradients", "optimizer")
    )
    assert resident == pytest.approx(found["resident"], rel=0.03)
    # The first update has no moments yet: they come with its step.
    made = found["resident"] - found["built"]
    for phase, most in (
        ("teacher", found.get("teacher")),
        ("update", found["update"] + made),
        ("optimizer step", found["optimizer step"]),
    ):
        parts = memory.phases[phase]  # type: ignore[index]
        if most is None:
            continue
        planned = sum(parts.values()) - parts["reserve"]
        assert planned == pytest.approx(most, rel=0.1), phase
        # What the phase adds to what stays is the harder part.
        adds = most - found["resident"]
        if phase == "optimizer step":  # it writes in place
            assert adds < 1e4
            assert planned == resident + parts["targets"]
        else:
            assert planned - resident == pytest.approx(adds, rel=0.1), phase


def test_planned_memory_of_a_rollout_is_what_it_holds(measured: dict[str, dict[str, Any]]) -> None:
    parts = memory_of(WITH_ROLLOUT, response=4).phases["rollout"]
    total = sum(parts.values()) - parts["reserve"]
    assert total == pytest.approx(measured[WITH_ROLLOUT]["rollout"], rel=0.1)
