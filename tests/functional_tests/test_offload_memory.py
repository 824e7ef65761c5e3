"""Offloading on a GPU: weights that a phase does not use take none of its memory."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dlm.parallel import initialized
from megatron_dlm.training.inputs import read_inputs
from megatron_dlm.training.loop import train
from megatron_dlm.training.offload import Phase
from megatron_dlm.training.run import build_run
from tests.tiny import run_config, save_random_model, write_data

SIZES = dict(num_hidden_layers=4, hidden_size=512, intermediate_size=2048, num_attention_heads=8)
HEAD_DIM = 64
PHASES: tuple[Phase, ...] = ("rollout", "teacher", "update")


def measure(folder: Path, device: str, offload: bool) -> dict[str, Any]:
    """A run in a process of its own: bytes allocated as each phase begins, and the losses."""
    config = run_config(
        folder,
        folder / "model",
        device=device,
        bf16=True,
        attention_backend="sdpa",
        num_rollouts=2,
        rollout_batch_size=8,
        offload_teacher=offload,
        offload_optimizer=offload,
        save=str(folder / f"run_{offload}"),
    )
    allocated: dict[str, int] = {}
    with initialized(config):
        run = build_run(config, read_inputs(config))
        enter = run.offload.enter

        def watched(phase: Phase) -> None:
            enter(phase)
            allocated[phase] = torch.cuda.memory_allocated()

        run.offload.enter = watched  # type: ignore[method-assign]
        train(run)
        parameters = sum(p.numel() for p in run.student.model.parameters())
    lines = (folder / f"run_{offload}" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    return {"allocated": allocated, "parameters": parameters, "losses": losses}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_idle_tensors_leave_the_device(tmp_path: Path) -> None:
    write_data(tmp_path)
    save_random_model(tmp_path / "model", head_dim=HEAD_DIM, **SIZES)
    # This process computes on the CPU: one that uses the GPU is another.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        kept, moved = pool.map(measure, [tmp_path] * 2, ["cuda"] * 2, [False, True])
    # Sums of atomic additions differ between runs; on a CPU the losses are the same bit for bit.
    assert moved["losses"] == pytest.approx(kept["losses"], rel=0.05)
    parameters = kept["parameters"]
    # Bytes of a parameter: 2 of the teacher; 4 of the main weight, 8 of Adam's moments and 4 of the
    # gradient.
    saved = {phase: kept["allocated"][phase] - moved["allocated"][phase] for phase in PHASES}
    assert saved["rollout"] > 0.9 * (2 + 16) * parameters
    assert saved["teacher"] > 0.9 * 16 * parameters
    assert saved["update"] > 0.8 * 2 * parameters  # the head stays
