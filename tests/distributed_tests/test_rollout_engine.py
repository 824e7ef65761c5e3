"""A rollout's tokens are the same under every parallel layout."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from megatron.core import parallel_state

from megatron_dlm.config.schema import Config, ParallelConfig
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.training.initialize import initialize
from tests.distributed_tests.spawn import run_distributed
from tests.unit_tests.rollout.tiny_models import (
    FULL_ATTENTION,
    load_model,
    make_engine,
    make_prompts,
    save_tiny_model,
)

# The second share is empty: a data-parallel rank without any work has to keep step.
LENGTHS = [5, 1, 8, 13, 2, 4, 11]
SHARES = {1: [7], 2: [7, 0], 4: [4, 0, 1, 2]}
BY_BLOCKS = {"block_size": 4, "remasking_strategy": "low_confidence_dynamic"}


def rollout(rank: int, folder: Path, parallel: dict[str, Any]) -> dict[str, list[tuple]]:
    initialize(Config(parallel=ParallelConfig(device="cpu", **parallel)))
    model = load_model(folder, **parallel)
    shares = SHARES[parallel_state.get_data_parallel_world_size()]
    mine = parallel_state.get_data_parallel_rank()
    first = sum(shares[:mine])
    prompts = make_prompts(LENGTHS[first : first + shares[mine]], first_sample=first)
    results: dict[str, list[tuple]] = {"data_parallel_rank": [(mine,)]}
    for name, engine in (
        ("sampled", make_engine(model, top_k=20, top_p=0.95)),
        ("static", make_engine(model, remasking_strategy="low_confidence_static")),
        (
            "autoregressive",
            make_engine(
                model, GenerationConfig.autoregressive(temperature=1.0, max_running_requests=3)
            ),
        ),
        ("whole", make_engine(model, FULL_ATTENTION, shifted=True, denoising_steps_per_block=5)),
        ("canvas", make_engine(model, FULL_ATTENTION, **BY_BLOCKS)),
    ):
        results[name] = [
            (
                trajectory.sample_index,
                trajectory.response_ids.tolist(),
                trajectory.unmask_step.tolist(),
                trajectory.tail_ids.tolist(),
                trajectory.finish_reason,
            )
            for trajectory in engine.generate(prompts, 13)
        ]
    return results


class Reference(NamedTuple):
    """A checkpoint folder and what one process rolls out with it."""

    folder: Path
    results: dict[str, list[tuple]]


def make_reference(folder: Path, moe: bool) -> Reference:
    save_tiny_model(folder, moe)
    return Reference(folder, run_distributed(rollout, 1, folder, {})[0])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tmp_path_factory.mktemp("qwen3"), moe=False)


@pytest.fixture(scope="module")
def mixture_of_experts(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tmp_path_factory.mktemp("qwen3_moe"), moe=True)


def check_layout(reference: Reference, world_size: int, parallel: dict[str, Any]) -> None:
    per_rank = run_distributed(rollout, world_size, reference.folder, parallel, timeout_seconds=300)
    for name in reference.results.keys() - {"data_parallel_rank"}:
        by_replica: dict[int, list[tuple]] = {}
        for results in per_rank:
            replica = results["data_parallel_rank"][0][0]
            # All model-parallel ranks hold the same trajectories.
            assert by_replica.setdefault(replica, results[name]) == results[name]
        together = [result for replica in sorted(by_replica) for result in by_replica[replica]]
        assert together == reference.results[name]


TP, PP, EP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
)


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, {TP: 2}),
        (2, {TP: 2, "sequence_parallel": True}),
        (2, {PP: 2}),
        (2, {}),
        (4, {TP: 2, PP: 2}),
    ],
    ids=["tp2", "tp2-sp", "pp2", "dp2", "tp2-pp2"],
)
def test_dense_layouts(dense: Reference, world_size: int, parallel: dict[str, Any]) -> None:
    check_layout(dense, world_size, parallel)


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, {EP: 2}),
        (4, {EP: 2, PP: 2}),
        (4, {TP: 2, EP: 2, "expert_tensor_parallel_size": 1, "sequence_parallel": True}),
        (4, {TP: 2, EP: 4, "expert_tensor_parallel_size": 1, "sequence_parallel": True}),
    ],
    ids=["ep2", "ep2-pp2", "tp2-ep2", "tp2-ep4"],
)
def test_mixture_of_experts_layouts(
    mixture_of_experts: Reference, world_size: int, parallel: dict[str, Any]
) -> None:
    check_layout(mixture_of_experts, world_size, parallel)
