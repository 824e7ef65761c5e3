"""Self-distillation as a user runs it: it resumes, hands on what it learnt, and improves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_dlm.training import loop
from tests.functional_tests.entry_points import CONVERT, run_process
from tests.tiny import (
    reward_every_third,
    run_config,
    run_training,
    save_random_model,
    state_convention,
    write_data,
)

ROLLOUTS = dict(objective="d_opsd", num_rollouts=3, rollout_batch_size=8)


class Interrupted(Exception):
    """Stands for a node that dies."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("d_opsd")
    write_data(folder)
    save_random_model(folder / "model")
    state_convention(folder / "model", "block_causal", shifted=False)
    return folder


def _run(folder: Path, load: Path, save: Path, **options: Any) -> list[dict[str, Any]]:
    config = run_config(folder, load, save=str(save), **{**ROLLOUTS, **options})
    with reward_every_third():
        lines = run_training(config)
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def _interrupt_after(monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    train_step = loop.train_step

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal updates
        if updates == 0:
            raise Interrupted
        updates -= 1
        return train_step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", failing)


def _exported(run: Path, target: Path) -> dict[str, torch.Tensor]:
    done = run_process(CONVERT, "--load", run, "--save", target, "--target-format", "qwen3")
    assert done.status == 0, done.stderr
    return load_file(target / "model.safetensors")


@pytest.mark.parametrize("adapters", [True, False])
def test_resumed_equals_uninterrupted_bit_for_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapters: bool
) -> None:
    model = folder / "model"
    options: dict[str, Any] = dict(lora_rank=3, use_distributed_optimizer=True)
    if not adapters:
        options = dict(teacher_load=str(model))
    expected = _run(folder, model, tmp_path / "whole", **options)
    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 5)
        with pytest.raises(Interrupted):
            _run(folder, model, broken, save_interval=1, **options)
    assert _run(folder, broken, broken, **options) == expected
    weights = _exported(broken, tmp_path / "broken_hf")
    for name, tensor in _exported(tmp_path / "whole", tmp_path / "whole_hf").items():
        assert torch.equal(weights[name], tensor), name


def test_a_new_run_starts_from_the_merged_weights(folder: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    _run(folder, folder / "model", first, lora_rank=3)
    merged = _exported(first, tmp_path / "merged")
    state_convention(tmp_path / "merged", "block_causal", shifted=False)  # as a qwen3, it is AR
    before = load_file(folder / "model" / "model.safetensors")
    assert any(not torch.equal(merged[name], tensor) for name, tensor in before.items())
    # Adapters start anew, with nothing learnt: the first loss is that of the exported weights.
    options: dict[str, Any] = dict(num_rollouts=1, lora_rank=2)
    again = _run(folder, first, tmp_path / "second", finetune=True, **options)
    exported = _run(folder, tmp_path / "merged", tmp_path / "third", **options)
    assert again == exported
