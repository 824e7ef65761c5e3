"""Every parallel layout trains like one process: rollout, teacher, loss, gradient, update."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed_tests.spawn import run_distributed
from tests.tiny import run_config, run_training, save_random_model, write_data

UPDATES = 5

DENSE_LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": dict(tensor_model_parallel_size=2),
    "TP2 SP": dict(tensor_model_parallel_size=2, sequence_parallel=True),
    "PP2": dict(pipeline_model_parallel_size=2),
    "DP2": {},
    "DP2 distributed optimizer": dict(use_distributed_optimizer=True),
    "PP2 recomputation": dict(pipeline_model_parallel_size=2, recompute_granularity="full"),
}
MOE_LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {},
    "EP2": dict(expert_model_parallel_size=2),
    "EP2 distributed optimizer": dict(expert_model_parallel_size=2, use_distributed_optimizer=True),
    "TP2 SP": dict(tensor_model_parallel_size=2, sequence_parallel=True),
}
FOUR_PROCESSES: dict[str, tuple[bool, dict[str, Any]]] = {
    "TP2 PP2": (False, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    "TP2 PP2 SP": (
        False,
        dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
    ),
    "PP2 DP2 distributed optimizer": (
        False,
        dict(pipeline_model_parallel_size=2, use_distributed_optimizer=True),
    ),
    "EP2 PP2": (True, dict(pipeline_model_parallel_size=2, expert_model_parallel_size=2)),
    "EP2 DP4": (True, dict(expert_model_parallel_size=2)),
    "EP2 TP2 SP": (
        True,
        dict(tensor_model_parallel_size=2, expert_model_parallel_size=2, sequence_parallel=True),
    ),
}


def _train(rank: int, folder: Path, runs: list[tuple[str, Path, dict[str, Any]]]) -> Any:
    results = {}
    for name, model, options in runs:
        save = str(folder / name.replace(" ", "_"))
        results[name] = run_training(run_config(folder, model, **{"save": save, **options}))
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    write_data(folder)
    save_random_model(folder / "dense")
    save_random_model(folder / "moe", moe=True)
    return folder


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, list[dict[str, Any]]]:
    runs = [(name, folder / name, {}) for name in ("dense", "moe")]
    runs = [(f"single {name}", model, options) for name, model, options in runs]
    return run_distributed(_train, 1, folder, runs)[0]


def _check(name: str, lines: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    assert len(lines) == len(reference) == UPDATES
    for line, expected in zip(lines, reference, strict=True):
        # Equal token counts at every update: the same tokens were drawn in the same steps.
        for key in ("supervised_tokens", "response_tokens_total", "tokens_per_forward", "eos_rate"):
            assert line[key] == expected[key], (name, key)
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4), name
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), name


def test_dense_layouts_of_two_processes(folder: Path, single: dict[str, Any]) -> None:
    runs = [(name, folder / "dense", options) for name, options in DENSE_LAYOUTS.items()]
    results = run_distributed(_train, 2, folder, runs, timeout_seconds=300)[0]
    for name in DENSE_LAYOUTS:
        _check(name, results[name], single["single dense"])


def test_moe_layouts_of_two_processes(folder: Path, single: dict[str, Any]) -> None:
    runs = [(f"moe {name}", folder / "moe", options) for name, options in MOE_LAYOUTS.items()]
    results = run_distributed(_train, 2, folder, runs, timeout_seconds=300)[0]
    for name in MOE_LAYOUTS:
        _check(name, results[f"moe {name}"], single["single moe"])


def test_layouts_of_four_processes(folder: Path, single: dict[str, Any]) -> None:
    runs = [
        (name, folder / ("moe" if moe else "dense"), options)
        for name, (moe, options) in FOUR_PROCESSES.items()
    ]
    results = run_distributed(_train, 4, folder, runs, timeout_seconds=300)[0]
    for name, (moe, _) in FOUR_PROCESSES.items():
        _check(name, results[name], single["single moe" if moe else "single dense"])
