"""FlexAttention under context parallelism learns what SDPA learns of whole rows, an update each.

With `test_training_layouts.py` every objective is run under CP2 and CP4 by both backends, and under
CP2 with each of TP, PP and EP.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_dlm.training.run import Run
from tests.distributed_tests.layouts import CP, EP, PP, RECOMPUTATION, SP, TP, Layout
from tests.distributed_tests.spawn import rejoin_world, run_distributed
from tests.flex import flex_on_cpu
from tests.tiny import (
    declare_diffusion_kind,
    reward_every_third,
    run_config,
    run_training,
    save_random_model,
    write_data,
)

PACKED: dict[str, Any] = dict(micro_batch_size=2)
ROLLOUT: dict[str, Any] = dict(PACKED, rollout_batch_size=4, max_response_length=8)
GIVEN: dict[str, Any] = dict(PACKED, train_iters=1, num_rollouts=None)
RUNS: dict[str, dict[str, Any]] = {
    "opdlm": ROLLOUT,
    "opdlm_off": dict(ROLLOUT, objective="opdlm_off"),
    "off_policy": dict(GIVEN, objective="off_policy", max_response_length=8),
    "sft": dict(GIVEN, objective="sft"),
    "scp": dict(GIVEN, objective="scp", train_iters=2, attention_annealing_iters=1),
    "next_token": dict(GIVEN, objective="next_token"),
    "d_opsd": dict(
        ROLLOUT,
        objective="d_opsd",
        lora_rank=2,
        lora_target_modules=("linear_qkv", "linear_proj"),  # experts split by TP have no adapters
    ),
}
"""One update of two rows of two texts for each objective; a second one under full attention."""
LAYOUTS: dict[str, tuple[Layout, tuple[str, ...]]] = {
    "CP4 recomputation": (Layout(4, "dense", {CP: 4, **RECOMPUTATION}), tuple(RUNS)),
    "TP2 CP2 SP": (
        Layout(4, "dense", {TP: 2, CP: 2, **SP}),
        ("opdlm_off", "off_policy", "next_token", "scp", "d_opsd"),
    ),
    "PP2 CP2": (Layout(4, "dense", {PP: 2, CP: 2}), ("opdlm", "next_token", "d_opsd", "scp")),
    "moe EP2 CP2 DP2": (
        Layout(4, "moe", {EP: 2, CP: 2}),
        ("opdlm_off", "sft", "scp", "d_opsd", "opdlm", "next_token"),
    ),
}
"""Those that `test_training_layouts.py` has not under these layouts, and what differs most."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flex")
    write_data(folder, 8)
    for model, moe in (("dense", False), ("moe", True)):
        save_random_model(folder / model, moe=moe)
        diffusion = save_random_model(folder / f"{model}_diffusion", moe=moe)
        declare_diffusion_kind(diffusion, "block_causal", shifted=False)
    return folder


def _train(
    rank: int, folder: Path, runs: list[tuple[str, str, dict[str, Any]]], flex: bool
) -> dict[str, list[dict[str, Any]]]:
    """The lines of metrics of each run."""
    results = {}
    for run, model, layout in runs:
        load = folder / (f"{model}_diffusion" if run == "d_opsd" else model)
        config = run_config(
            folder, load, save=str(folder / f"{run} {model} {layout}"), **{**RUNS[run], **layout}
        )
        backend = flex_on_cpu() if flex else nullcontext([1])
        with backend as calls, mock.patch.object(Run, "save"), reward_every_third():
            results[f"{run} {model}"] = run_training(config)
        assert calls, "no row was long enough"
        rejoin_world()
    return results


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, list[dict[str, Any]]]:
    runs = {(run, layout.model) for layout, runs in LAYOUTS.values() for run in runs}
    started = [(run, model, {}) for run, model in sorted(runs)]
    results: dict[str, list[dict[str, Any]]] = run_distributed(_train, 1, folder, started, False)[0]
    return results


@pytest.mark.parametrize("name", LAYOUTS)
def test_flex_over_shares_learns_like_sdpa_over_rows(
    folder: Path, single: dict[str, list[dict[str, Any]]], name: str
) -> None:
    layout, runs = LAYOUTS[name]
    started = [(run, layout.model, layout.options) for run in runs]
    results = run_distributed(_train, layout.processes, folder, started, True)
    for of_run, lines in results[0].items():
        for line, expected in zip(lines, single[of_run], strict=True):
            assert line["supervised_tokens"] == expected["supervised_tokens"] > 0, of_run
            assert expected["loss"] > 0.01, of_run
            for key in ("loss", "grad_norm"):
                assert line[key] == pytest.approx(expected[key], rel=1e-4), (of_run, key)
