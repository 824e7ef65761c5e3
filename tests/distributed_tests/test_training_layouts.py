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
OBJECTIVES: dict[str, dict[str, Any]] = {
    "opdlm": {},
    "opdlm_off": dict(objective="opdlm_off"),
    "off_policy": dict(objective="off_policy"),
    "sft": dict(objective="sft"),
    "scp": dict(objective="scp", micro_batch_size=2, eval_interval=2, eval_iters=2),
    "mixture": dict(teacher_response_fraction=0.5, micro_batch_size=2),
}
"""opdlm runs under every layout, the others once under each kind of parallelism."""

OTHER_DENSE_LAYOUTS = ("TP2 SP", "PP2", "DP2 distributed optimizer")
OTHER_MOE_LAYOUTS = ("moe EP2",)
OTHER_FOUR_PROCESSES = ("TP2 PP2 SP", "EP2 TP2 SP")


def _train(rank: int, folder: Path, runs: list[tuple[str, Path, dict[str, Any]]]) -> Any:
    results = {}
    for name, model, options in runs:
        save = str(folder / name.replace(" ", "_"))
        if "eval_interval" in options:
            options = {**options, "valid_data_path": str(folder / "corpus_heldout")}
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
    runs = [
        (f"single {model} {objective}", folder / model, options)
        for model in ("dense", "moe")
        for objective, options in OBJECTIVES.items()
    ]
    return run_distributed(_train, 1, folder, runs, timeout_seconds=300)[0]


def _runs(
    folder: Path, layouts: dict[str, tuple[bool, dict[str, Any]]], others: tuple[str, ...]
) -> list[tuple[str, Path, dict[str, Any]]]:
    """opdlm under all layouts (mixture of experts or not, options), the other objectives some."""
    return [
        (
            f"{layout} {objective}",
            folder / ("moe" if moe else "dense"),
            {**options, **layout_options},
        )
        for layout, (moe, layout_options) in layouts.items()
        for objective, options in OBJECTIVES.items()
        if objective == "opdlm" or layout in others
    ]


def _responses(folder: Path, name: str) -> list[str]:
    """Lines of all shards of a run's teacher responses, in the order of the prompts."""
    shards = sorted((folder / name.replace(" ", "_") / "teacher_responses").glob("*.jsonl"))
    return [line for shard in shards for line in shard.read_text().splitlines()]


def _check(name: str, lines: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    assert len(lines) == len(reference) == UPDATES
    for line, expected in zip(lines, reference, strict=True):
        # Equal token counts at every update: the same tokens were drawn in the same steps.
        for key in ("supervised_tokens", "response_tokens_total", "tokens_per_forward", "eos_rate"):
            assert line[key] == expected[key], (name, key)
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4), name
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), name
        is_due = "scp" in name and line["step"] in (2, 4, UPDATES)
        assert (line["validation_loss"] is not None) == is_due, name
        if is_due:
            held_out = pytest.approx(expected["validation_loss"], rel=1e-4)
            assert line["validation_loss"] == held_out, name


def _check_layouts(
    world_size: int,
    folder: Path,
    single: dict[str, list[dict[str, Any]]],
    layouts: dict[str, tuple[bool, dict[str, Any]]],
    others: tuple[str, ...],
) -> None:
    runs = _runs(folder, layouts, others)
    results = run_distributed(_train, world_size, folder, runs, timeout_seconds=300)[0]
    for name, model, _ in runs:
        reference = f"single {model.name} {name.split()[-1]}"
        _check(name, results[name], single[reference])
        responses = _responses(folder, name)
        assert responses == _responses(folder, reference), name
        assert len(responses) == (48 if name.endswith(("off_policy", "mixture")) else 0)


def test_dense_layouts_of_two_processes(folder: Path, single: dict[str, Any]) -> None:
    layouts = {name: (False, options) for name, options in DENSE_LAYOUTS.items()}
    _check_layouts(2, folder, single, layouts, OTHER_DENSE_LAYOUTS)


def test_moe_layouts_of_two_processes(folder: Path, single: dict[str, Any]) -> None:
    layouts = {f"moe {name}": (True, options) for name, options in MOE_LAYOUTS.items()}
    _check_layouts(2, folder, single, layouts, OTHER_MOE_LAYOUTS)


def test_layouts_of_four_processes(folder: Path, single: dict[str, Any]) -> None:
    _check_layouts(4, folder, single, FOUR_PROCESSES, OTHER_FOUR_PROCESSES)
