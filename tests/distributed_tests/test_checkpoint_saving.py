"""Checkpoints of several ranks: memory, exactness at every layout, writing in the background."""

import errno
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_dlm import platform
from megatron_dlm.config import Config
from megatron_dlm.errors import UserError
from megatron_dlm.parallel import from_rank_zero, initialized
from megatron_dlm.training import checkpoint_saving
from megatron_dlm.training.checkpoint_saving import CheckpointSaver
from megatron_dlm.training.checkpointing import find_checkpoint, sharded_state
from megatron_dlm.training.inputs import read_inputs
from megatron_dlm.training.resume import resumable_config
from megatron_dlm.training.run import Run, build_run
from megatron_dlm.training.run_folder import saved_iterations
from megatron_dlm.training.run_start import decide_start
from megatron_dlm.training.tensor_file import write_tensor_file
from tests.distributed_tests.layouts import CP, DISTRIBUTED_OPTIMIZER, EP, ETP, PP, SP, TP
from tests.distributed_tests.spawn import rejoin_world, run_distributed
from tests.tiny import run_config, save_random_model, write_data

GIVEN: dict[str, Any] = dict(objective="sft", lr_warmup_iters=0, **DISTRIBUTED_OPTIMIZER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saving")
    write_data(folder)
    save_random_model(folder / "dense")
    save_random_model(folder / "moe", moe=True)
    save_random_model(folder / "wide", num_hidden_layers=6, hidden_size=256, intermediate_size=512)
    return folder


@contextmanager
def _run(folder: Path, model: Path, save: str, **options: Any) -> Iterator[Run]:
    """A run that is built and not trained."""
    config = run_config(folder, model, **{**GIVEN, **options, "save": save})
    start = from_rank_zero(lambda: decide_start(config))
    inputs = read_inputs(start.config, start.resumed)
    with initialized(start.config):
        yield build_run(start.config, inputs)
    rejoin_world()


def _update(run: Run, seed: int) -> None:
    """An optimizer update with random gradients, the same on all data-parallel ranks."""
    parameters = dict(run.student.model.named_parameters())
    for number, name in enumerate(sorted(parameters)):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        gradient = parameters[name].main_grad  # type: ignore[attr-defined]
        gradient.copy_(torch.randn(gradient.shape, generator=generator))
    run.student.optimizer.step()
    run.progress.iteration += 1


def _held(run: Run) -> list[torch.Tensor]:
    """Copies of all that this rank holds of model and optimizer."""
    optimizer = run.student.optimizer
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    tensors = [parameter.detach() for parameter in run.student.model.parameters()]
    for part in parts:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                tensors += [parameter.detach(), *(state[key] for key in sorted(state))]
    return [tensor.clone() for tensor in tensors]


def _peak_allocated(call: Callable[[], Any]) -> int:
    """Bytes of tensors that a call allocates and holds at the same time, counted one by one."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def _measure_memory(rank: int, folder: Path, save: str) -> Any:
    found: dict[str, Any] = {}
    with _run(folder, folder / "wide", save) as run:
        _update(run, 0)
        model_state = sharded_state(run.student.model, None, is_loading=False)["model"]
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
        found["gathered"] = _peak_allocated(
            lambda: run.student.optimizer.sharded_state_dict(model_state, metadata=metadata)
        )
        for in_background in (True, False):
            run.saver = CheckpointSaver(save, in_background=in_background)

            def save_and_wait(saver: CheckpointSaver = run.saver) -> None:
                run.save()
                saver.finish()

            found["background" if in_background else "waiting"] = _peak_allocated(save_and_wait)
            if in_background:
                assert run.saver._host is not None
                found["host"] = run.saver._host.bytes
        found["parameters"] = sum(p.numel() for p in run.student.model.parameters())
        found["largest"] = max(p.numel() for p in run.student.model.parameters())
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_save_takes_memory_for_the_ranks_own_share(
    folder: Path, tmp_path: Path, ranks: int
) -> None:
    results = run_distributed(_measure_memory, ranks, folder, str(tmp_path))
    bytes_of_run = results[0]["parameters"] * 4 * 4  # weights and three fp32 tensors of Adam
    small = 300_000  # plans and other messages
    for found in results:
        share = bytes_of_run / ranks
        assert found["host"] == pytest.approx(share, rel=0.15)
        assert found["background"] < found["host"] + small
        assert found["waiting"] < found["largest"] * 4 + small
        # The counter sees what Megatron's own form gathers: three tensors of the whole.
        assert found["gathered"] > 0.75 * bytes_of_run
    assert sum(found["host"] for found in results) == pytest.approx(bytes_of_run, rel=0.01)


def _write_both_forms(
    rank: int, folder: Path, model: str, save: str, options: dict[str, Any]
) -> None:
    with _run(folder, folder / model, save, **options) as run:
        for seed in range(2):
            _update(run, seed)
        state = sharded_state(run.student.model, run.student, is_loading=False)
        state["optimizer"] = run.student.optimizer.sharded_state_dict(
            sharded_state(run.student.model, None, is_loading=False)["model"],
            metadata={
                "distrib_optim_sharding_type": "fully_reshardable",
                "chained_optim_avoid_prefix": True,
            },
        )
        state["progress"] = {"iteration": 2}
        state["config"] = resumable_config(run.config, run.inputs)
        gathered = Path(save, "gathered")
        gathered.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        # To write at once needs no process that collects results, and none is started.
        with mock.patch.object(filesystem_async, "_results_queue", Queue()):
            dist_checkpointing.save(state, str(gathered))
        before = _held(run)
        run.save()
        _update(run, 2)  # training goes on in place
        assert not all(map(torch.equal, before, _held(run)))
        assert run.saver is not None
        run.saver.finish()


def _load_and_save(rank: int, folder: Path, load: str, save: str, options: dict[str, Any]) -> None:
    with _run(folder, Path(load), save, **options) as run:
        run.save()
        assert run.saver is not None
        run.saver.finish()


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    with initialized(Config.from_dict({"device": "cpu"})):
        found = dist_checkpointing.load_plain_tensors(str(checkpoint))
    assert any("exp_avg_sq" in name for name in found)
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        # Rows that pad the vocabulary depend on the layout and are never read.
        rows = min(len(tensor), len(actual[name])) if tensor.ndim else None
        if rows is None:
            assert torch.equal(actual[name], tensor), name
        else:
            assert torch.equal(actual[name][:rows], tensor[:rows]), name


@pytest.mark.parametrize(
    ("ranks", "model", "options", "others"),
    [
        (4, "dense", {TP: 2}, [(2, {CP: 2}), (2, {PP: 2})]),
        (4, "moe", {EP: 2, CP: 2}, [(2, {TP: 2, EP: 2, ETP: 1, **SP}), (2, {})]),
    ],
    ids=["TP2 DP2", "EP2 CP2 DP2"],
)
def test_what_is_saved_is_exact_at_every_layout(
    folder: Path,
    tmp_path: Path,
    ranks: int,
    model: str,
    options: dict[str, Any],
    others: list[tuple[int, dict[str, Any]]],
) -> None:
    """Both as Megatron's gathering form has it, which is loaded too, and from layout to layout."""
    run = tmp_path / "run"
    run_distributed(_write_both_forms, ranks, folder, model, str(run), options)
    gathered, saved = run / "gathered", run / "iter_0000002"
    shutil.copytree(saved / "hf", gathered / "hf")
    expected = _tensors(gathered)
    _assert_same(_tensors(saved), expected)
    for number, (processes, layout) in enumerate(others):
        moved = tmp_path / str(number)
        run_distributed(_load_and_save, processes, folder, str(saved), str(moved), layout)
        _assert_same(_tensors(find_checkpoint(moved)), expected)
    run_distributed(_load_and_save, 2, folder, str(gathered), str(tmp_path / "old"), {})
    _assert_same(_tensors(find_checkpoint(tmp_path / "old")), expected)


def _save(run: Run, iteration: int) -> CheckpointSaver:
    run.progress.iteration = iteration
    run.save()
    assert run.saver is not None
    return run.saver


def _poll_until_published(saver: CheckpointSaver) -> Path:
    while True:
        published = saver.poll()
        if published is not None:
            return published


def _in_background(rank: int, folder: Path, save: str) -> str:
    with _run(folder, folder / "dense", save) as run:
        _update(run, 0)
        assert _poll_until_published(_save(run, 1)).name == "iter_0000001"
        may_write = threading.Event()

        def slowly(*args: Any) -> Any:
            may_write.wait()
            return write_tensor_file(*args)

        with mock.patch.object(checkpoint_saving, "write_tensor_file", slowly):
            saver = _save(run, 2)
        assert saver.poll() is None
        # What a run leaves that dies now; its next start removes the temporary folder.
        assert sorted(path.name for path in Path(save).glob("iter_*")) == [
            "iter_0000001",
            "iter_0000002.tmp",
        ]
        assert find_checkpoint(save).name == "iter_0000001"
        threading.Timer(0.1, may_write.set).start()
        _save(run, 3)  # waits for the one before
        assert saved_iterations(save) == [1, 2]
        assert saver.finish() == Path(save, "iter_0000003")
        assert saver.poll() is saver.finish() is None

        def refused(*args: Any) -> Any:
            if rank == 1:
                raise OSError(errno.ENOSPC, "")
            return write_tensor_file(*args)

        with mock.patch.object(checkpoint_saving, "write_tensor_file", refused):
            _save(run, 4)
        with pytest.raises(UserError) as failed:
            _poll_until_published(saver)
        torch.distributed.barrier()
        assert sorted(path.name for path in Path(save).glob("iter_*")) == [
            "iter_0000001",
            "iter_0000002",
            "iter_0000003",
        ]
        run.saver = CheckpointSaver(save, in_background=True)
        allocate = platform.host_memory

        def no_memory(size: int) -> torch.Tensor:
            if size and rank == 0:
                raise RuntimeError("can't allocate memory")
            return allocate(size)

        with (
            mock.patch.object(platform, "host_memory", no_memory),
            pytest.raises(UserError) as full,
        ):
            _save(run, 5)
        assert "--no-async-save" in str(full.value)
        _save(run, 5).finish()
        assert find_checkpoint(save).name == "iter_0000005"
    return str(failed.value)


def test_a_checkpoint_is_published_when_the_files_of_all_ranks_are_written(
    folder: Path, tmp_path: Path
) -> None:
    save = str(tmp_path / "run")
    for line in run_distributed(_in_background, 2, folder, save):
        assert line == (
            f"--save = {save!r}: iter_0000004 could not be written (No space left on device); "
            "make room there or repair it, and start again from iter_0000003"
        )
