"""Offloading: idle storages are empty, shared ones stay intact, results are the same."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dlm.activity import ACTIVITY, Work
from megatron_dlm.parallel import initialized
from megatron_dlm.teacher.frozen import FrozenTeacher
from megatron_dlm.teacher.self_teacher import SelfTeacher
from megatron_dlm.training import loop
from megatron_dlm.training.inputs import read_inputs
from megatron_dlm.training.offload import HostedTensors, _optimizer_tensors
from megatron_dlm.training.run import Run, build_run
from tests.tiny import (
    declare_diffusion_kind,
    reward_every_third,
    run_config,
    run_training,
    save_random_model,
    write_data,
)

ROLLOUTS = dict(num_rollouts=2, rollout_batch_size=8)
BOTH = dict(offload_teacher=True, offload_optimizer=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offload")
    write_data(folder)
    save_random_model(folder / "dense")
    save_random_model(folder / "moe", moe=True)
    save_random_model(folder / "diffusion")
    declare_diffusion_kind(folder / "diffusion", "block_causal", shifted=False)
    return folder


def held(tensors: Any) -> int:
    """Bytes of the storages of tensors, each storage once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("constant", [True, False])
def test_views_have_their_values_again(constant: bool) -> None:
    base = torch.arange(12.0)
    view, other = base[3:7].view(2, 2), torch.randn(5, dtype=torch.float64).bfloat16()
    expected = [tensor.clone() for tensor in (base, view, other)]
    hosted = HostedTensors(lambda: [view, base, other], constant=constant)
    for _ in range(2):
        hosted.offload()
        hosted.offload()  # twice is once
        assert held([base, view, other]) == 0
        hosted.restore()
        hosted.restore()
        for tensor, value in zip((base, view, other), expected, strict=True):
            assert torch.equal(tensor, value)
        view.add_(0 if constant else 1)
        expected = [tensor.clone() for tensor in (base, view, other)]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("dense", ROLLOUTS),
        ("dense", {**ROLLOUTS, "bf16": True}),
        ("dense", {**ROLLOUTS, "use_distributed_optimizer": True}),
        ("moe", {**ROLLOUTS, "bf16": True, "use_distributed_optimizer": True}),
        ("dense", {"objective": "off_policy", "train_iters": 2}),
        ("diffusion", {**ROLLOUTS, "objective": "d_opsd", "max_tries": 2}),
    ],
    ids=["float32", "bf16", "distributed", "moe bf16 distributed", "off_policy", "frozen copy"],
)
@pytest.mark.slow
def test_phases_hold_what_they_use_and_results_are_the_same(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    options: dict[str, Any],
) -> None:
    if options.get("objective") == "d_opsd":
        options = {**options, "teacher_load": str(folder / model)}
    plain = run_config(folder, folder / model, **options, save=str(tmp_path / "plain"))
    with reward_every_third():
        expected = run_training(plain)
    config = run_config(folder, folder / model, **options, **BOTH, save=str(tmp_path / "moved"))
    seen: list[str] = []

    def watch(phase: str, run: Run) -> None:
        seen.append(phase)
        assert isinstance(run.teacher, FrozenTeacher | SelfTeacher)
        # The loss reads the output layer of a teacher that leaves hidden states.
        heads = [] if run.teacher.head is None else [run.teacher.head]
        assert len(heads) == isinstance(run.teacher, FrozenTeacher)
        teacher, student = (
            list(run.teacher.model.parameters()),
            list(run.student.model.parameters()),
        )
        of_optimizer = list(_optimizer_tensors(run.student.optimizer))
        gradients = [parameter.main_grad for parameter in student]
        assert held(student) > 0
        assert held(gradients) == (held_gradients if phase == "update" else 0)
        shared = 0 if config.model.bf16 else held(student)  # its own main weights
        if phase == "update":
            assert held(teacher) == held(heads)
            assert held(heads) > 0 or not heads
            assert held(of_optimizer) > shared or not shared
        else:
            assert held(of_optimizer) == shared
            assert (held(teacher) == 0) if phase == "rollout" else held(teacher) > held(heads)

    with reward_every_third(), initialized(config):
        run = build_run(config, read_inputs(config))
        held_gradients = held([p.main_grad for p in run.student.model.parameters()])

        def hook(owner: Any, name: str, phase: str) -> None:
            original = getattr(owner, name)

            def watched(*args: Any, **options: Any) -> Any:
                result = original(*args, **options)
                watch(phase, run)
                return result

            monkeypatch.setattr(owner, name, watched)

        if run.source.engine is not None:
            hook(run.source.engine, "generate_together", "rollout")
        hook(run.teacher, "annotate", "teacher")
        works: list[Work] = []
        working = ACTIVITY.working

        @contextmanager
        def kept(unit: str, total: int) -> Iterator[Work]:
            with working(unit, total) as work:
                works.append(work)
                yield work

        monkeypatch.setattr(ACTIVITY, "working", kept)
        hook(loop, "train_step", "update")
        loop.train(run)
    turns = ["rollout", "teacher", "update"] if config.uses_rollouts else ["teacher", "update"]
    assert [phase for phase, _ in groupby(seen)] == turns * 2
    assert seen.count("update") == config.train_iters
    of_teacher = [w for w in works if w.unit in ("rows", "trajectories")]
    assert len(of_teacher) == seen.count("teacher")
    assert all(0 < work.done == work.total for work in works)
    lines = [json.loads(line) for line in (tmp_path / "moved" / "metrics.jsonl").open()]
    for line, other in zip(lines, expected, strict=True):
        timings = {"time": None, "throughput": None}
        assert line | timings == other | timings
