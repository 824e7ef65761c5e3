"""Shares of rows, beside every other kind of parallelism, are learned like whole rows.

Every objective, by either backend, under CP2 and CP4 alone and with each of TP, PP and EP: loss,
gradient norm and the gradient of every parameter are those of one process, which runs SDPA on rows
of one text. `make test` has some of each, `make test-layouts` all of them, packed in two ways.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from megatron_dlm.config.rules.usage import is_used
from megatron_dlm.training import loop
from megatron_dlm.training.run import Run
from tests.distributed_tests.gradients import (
    Piece,
    largest_difference,
    recorded_gradients,
    whole,
)
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

ROLLOUT: dict[str, Any] = dict(rollout_batch_size=4, max_response_length=8, dynamic_threshold=0.2)
GIVEN: dict[str, Any] = dict(train_iters=1, num_rollouts=None)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "opdlm": ROLLOUT,
    "opdlm_off": dict(ROLLOUT, objective="opdlm_off"),
    "off_policy": dict(GIVEN, objective="off_policy", max_response_length=8),
    "sft": dict(GIVEN, objective="sft"),
    # The second update is under full attention.
    "scp": dict(GIVEN, objective="scp", train_iters=2, attention_annealing_iters=1),
    "next_token": dict(GIVEN, objective="next_token"),
    # Half of the adapters' weights have no gradient at first.
    "d_opsd": dict(
        ROLLOUT,
        objective="d_opsd",
        epochs_per_rollout=2,
        lora_rank=2,
        lora_target_modules=("linear_qkv", "linear_proj"),  # experts split by TP have no adapters
    ),
}
"""Options of each; an update is of four texts."""
TWICE = ("scp", "d_opsd")
"""Objectives with two updates; the others have one."""
PACKINGS: dict[str, dict[str, Any]] = {
    "single texts": dict(micro_batch_size=1),
    "pairs": dict(micro_batch_size=2),
    "budget": dict(max_tokens_per_micro_batch=250, **RECOMPUTATION),
}
"""Rows by name; those of one process are single texts."""


class Started(NamedTuple):
    """A run: of which objective, by which backend, in which rows."""

    objective: str
    backend: str
    packing: str


def _runs(backend: str, packing: str, objectives: str) -> tuple[Started, ...]:
    return tuple(Started(objective, backend, packing) for objective in objectives.split())


EVERY_RUN = tuple(
    run
    for backend in ("sdpa", "flex")
    for packing in ("pairs", "budget")
    for run in _runs(backend, packing, " ".join(OBJECTIVES))
)
LAYOUTS: dict[str, tuple[Layout, tuple[Started, ...]]] = {
    "TP2 CP4 SP": (
        Layout(8, "dense", {TP: 2, CP: 4, **SP}),
        _runs("sdpa", "budget", "opdlm off_policy d_opsd")
        + _runs("flex", "pairs", "sft next_token"),
    ),
    "PP2 CP4": (
        Layout(8, "dense", {PP: 2, CP: 4}),
        _runs("sdpa", "pairs", "opdlm_off off_policy next_token d_opsd")
        + _runs("flex", "budget", "scp"),
    ),
    # Eight ranks have four prompts to answer.
    "moe EP2 CP4 DP2": (
        Layout(8, "moe", {EP: 2, CP: 4, "rollout_context_parallel": "tokens"}),
        _runs("sdpa", "budget", "opdlm opdlm_off scp") + _runs("flex", "pairs", "sft"),
    ),
    "TP2 CP2 SP": (
        Layout(4, "dense", {TP: 2, CP: 2, **SP}),
        _runs("sdpa", "budget", "opdlm_off off_policy next_token")
        + _runs("flex", "pairs", "opdlm_off off_policy scp next_token d_opsd")
        + _runs("flex", "budget", "opdlm sft"),
    ),
    "PP2 CP2": (
        Layout(4, "dense", {PP: 2, CP: 2}),
        _runs("sdpa", "pairs", "opdlm sft next_token d_opsd")
        + _runs("flex", "pairs", "opdlm scp next_token d_opsd")
        + _runs("flex", "budget", "opdlm_off off_policy sft"),
    ),
    "moe EP2 CP2 DP2": (
        Layout(4, "moe", {EP: 2, CP: 2}),
        _runs("sdpa", "budget", "opdlm_off sft scp d_opsd")
        + _runs("flex", "pairs", "opdlm opdlm_off sft scp next_token d_opsd")
        + _runs("flex", "budget", "off_policy"),
    ),
    "CP4": (
        Layout(4, "dense", {CP: 4, **RECOMPUTATION}),
        _runs("flex", "pairs", " ".join(OBJECTIVES)),
    ),
    "CP2": (Layout(2, "dense", {CP: 2}), ()),
}
"""Each with what `make test` runs under it, beside the runs of `test_training_layouts.py`."""
CASES = [
    *(pytest.param(name, runs, id=name) for name, (_, runs) in LAYOUTS.items() if runs),
    *(
        pytest.param(name, EVERY_RUN, id=f"{name} everything", marks=pytest.mark.layouts)
        for name in LAYOUTS
    ),
]


class Learned(NamedTuple):
    """What a run measured, and this rank's pieces of the gradient of each update."""

    lines: list[dict[str, Any]]
    gradients: list[list[Piece]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("context")
    write_data(folder, 8)
    for model, moe in (("dense", False), ("moe", True)):
        save_random_model(folder / model, moe=moe)
        diffusion = save_random_model(folder / f"{model}_diffusion", moe=moe)
        declare_diffusion_kind(diffusion, "block_causal", shifted=False)
    return folder


def _train(
    rank: int, folder: Path, runs: list[tuple[str, Started]], layout: dict[str, Any]
) -> list[Learned]:
    """Runs of models by name, one after the other."""
    results = []
    for model, run in runs:
        load = folder / (f"{model}_diffusion" if run.objective == "d_opsd" else model)
        save = folder / "_".join((model, *map(str, layout.values()), *run)).replace(" ", "_")
        options = {**OBJECTIVES[run.objective], **PACKINGS[run.packing], **layout}
        config = run_config(folder, load, save=str(save), **options)
        if not is_used(config, "rollout_context_parallel"):  # nothing is decoded
            config = config.changed(rollout_context_parallel="sequences")
        backend = flex_on_cpu() if run.backend == "flex" else nullcontext([1])
        with (
            backend as calls,
            mock.patch.object(Run, "save"),
            mock.patch.object(loop, "write_report"),
            reward_every_third(),
            recorded_gradients() as gradients,
        ):
            results.append(Learned(run_training(config), gradients))
        assert calls, "no row was long enough"
        rejoin_world()
    return results


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[tuple[str, str], Learned]:
    """What one process learns, by model and objective."""
    runs = [
        (model, Started(objective, "sdpa", "single texts"))
        for model in ("dense", "moe")
        for objective in OBJECTIVES
    ]
    [results] = run_distributed(_train, 1, folder, runs, {})
    return {
        (model, run.objective): learned for (model, run), learned in zip(runs, results, strict=True)
    }


@pytest.mark.parametrize(("name", "runs"), CASES)
def test_shares_of_rows_are_learned_like_whole_rows(
    folder: Path,
    single: dict[tuple[str, str], Learned],
    name: str,
    runs: tuple[Started, ...],
) -> None:
    layout, _ = LAYOUTS[name]
    started = [(layout.model, run) for run in runs]
    ranks = run_distributed(
        _train, layout.processes, folder, started, layout.options, timeout_seconds=560
    )
    for number, run in enumerate(runs):
        expected, of_ranks = single[layout.model, run.objective], [rank[number] for rank in ranks]
        lines = of_ranks[0].lines
        assert len(lines) == len(expected.lines) == (2 if run.objective in TWICE else 1)
        for update, (line, reference) in enumerate(zip(lines, expected.lines, strict=True)):
            assert line["supervised_tokens"] == reference["supervised_tokens"] > 0, run
            assert reference["loss"] > 0.01, run
            for key in ("loss", "grad_norm"):
                assert line[key] == pytest.approx(reference[key], rel=1e-4), (run, key)
            pieces = [learned.gradients[update] for learned in of_ranks]
            difference = largest_difference(pieces, whole(expected.gradients[update]))
            assert difference < 1e-4, (run, update)


def test_every_gradient_is_compared(single: dict[tuple[str, str], Learned]) -> None:
    """What is recorded has the norm that is reported, and nothing that is trained stays at zero."""
    for (model, objective), learned in single.items():
        updates = [whole(pieces) for pieces in learned.gradients]
        for line, gradients in zip(learned.lines, updates, strict=True):
            norm = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
            assert norm == pytest.approx(line["grad_norm"], rel=1e-5), (model, objective)
        names = updates[0].keys()
        without = {name for name in names if not any(update[name].any() for update in updates)}
        trained = {name for name in names if "lora" in name or objective != "d_opsd"}
        assert without == names - trained, (model, objective)
