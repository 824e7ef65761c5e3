"""A resumed run equals the uninterrupted one, bit for bit; other layouts can resume it.

Prompts come from a mixture of sources, with weights, caps, and suffixes and limits by domain.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm.config import Config
from megatron_dlm.errors import UserError
from megatron_dlm.training import loop
from megatron_dlm.training.checkpointing import find_checkpoint
from tests.distributed_tests.spawn import run_distributed
from tests.faults.runs import check_same
from tests.tiny import (
    declare_diffusion_kind,
    reward_every_third,
    run_config,
    run_training,
    save_random_model,
    write_data,
)

COMMON = dict(lr_warmup_iters=2, log_interval=1)
MIXTURE = """
sources:
  - {path: math.jsonl, domain: math, weight: 1.5}
  - {path: code.jsonl, domain: code, max_samples: 6}
"""
"""15 records of 10, and 6 of 20; rollouts visit them in a new order every 21 samples."""
VIRTUAL_STAGES = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
ROLLOUTS: dict[str, Any] = dict(
    COMMON,
    num_rollouts=3,
    rollout_batch_size=8,
    max_response_length=8,
    prompts="mixture.yaml",
    prompt_suffix_by_domain={"math": " 7", "default": ""},
    max_response_length_by_domain={"code": 6, "default": 8},
)
GIVEN = dict(COMMON, train_iters=6)
EPOCH = {**ROLLOUTS, "num_rollouts": None, "num_epochs": 1}
"""Rollouts of 8, 8 and 5 prompts, updates of 4, 4, 4, 4, 4 and 1."""

GROUPS = [
    {"pattern": "attention", "lr": 3e-3, "min_lr": 2e-3, "weight_decay": 0.1},
    {"pattern": "mlp", "lr": 1e-5, "min_lr": 1e-6},
]
ADAPTERS = {"lora_rank": 3, "lora_alpha": 6}

OBJECTIVES: dict[str, dict[str, Any]] = {
    "opdlm": ROLLOUTS,
    "opdlm_off": ROLLOUTS,
    "off_policy": GIVEN,
    "sft": GIVEN,
    "scp": GIVEN,
    "next_token": GIVEN,
    "d_opsd": {**ROLLOUTS, **ADAPTERS},
}
"""Six updates of each."""


class Interrupted(Exception):
    """Stands for a node that dies."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    prompts, _ = write_data(folder)
    lines = prompts.read_text().splitlines(keepends=True)
    (folder / "math.jsonl").write_text("".join(lines[:10]))
    (folder / "code.jsonl").write_text("".join(lines[10:30]))
    (folder / "mixture.yaml").write_text(MIXTURE)
    save_random_model(folder / "dense")
    save_random_model(folder / "moe", moe=True, num_hidden_layers=4)
    declare_diffusion_kind(save_random_model(folder / "diffusion"), "block_causal", shifted=False)
    return folder


def _config(folder: Path, model: Path, **options: Any) -> Config:
    """A run; the file of its prompts is in the folder."""
    if "prompts" in options:
        options["prompts"] = str(folder / options["prompts"])
    return run_config(folder, model, **options)


@pytest.fixture(scope="module")
def whole_runs() -> dict[str, Path]:
    """Folders of runs that nobody interrupts, by their configuration, as they are asked for."""
    return {}


def _whole(
    folder: Path, whole_runs: dict[str, Path], model: str, options: dict[str, Any]
) -> tuple[Path, list[dict[str, Any]]]:
    """The folder and the metrics of a run of one process."""
    config = _config(folder, folder / model, **options)
    run = whole_runs.setdefault(config.to_yaml(), folder / f"whole_{len(whole_runs)}")
    with reward_every_third():
        return run, run_training(config.changed(save=str(run)))  # which may have ended already


def _interrupt_after(monkeypatch: pytest.MonkeyPatch, updates: int, config: Config) -> None:
    done = 0
    train_step = loop.train_step

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        if done == updates:
            raise Interrupted
        done += 1
        return train_step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", failing)
        with pytest.raises(Interrupted):
            run_training(config)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("dense", ROLLOUTS),
        ("moe", {**ROLLOUTS, "use_distributed_optimizer": True}),
        ("dense", {**GIVEN, "objective": "next_token"}),
        ("dense", {**ROLLOUTS, "bf16": True}),
        ("dense", {**GIVEN, "objective": "off_policy"}),
        (
            "dense",
            {
                **ROLLOUTS,
                "teacher_response_fraction": 0.8,
                "teacher_response_fraction_schedule": "linear",
            },
        ),
        ("moe", {**GIVEN, "objective": "scp", "attention_annealing_iters": 6}),
        ("dense", {**GIVEN, "objective": "sft"}),
        ("dense", {**ROLLOUTS, "objective": "opdlm_off"}),
        ("dense", {**ROLLOUTS, "param_groups": GROUPS}),
        ("dense", {**ROLLOUTS, "param_groups": GROUPS, "use_distributed_optimizer": True}),
        (
            "dense",
            {
                **GIVEN,
                "objective": "off_policy",
                "divergence_top_k": 6,
                "cache_teacher_targets": True,
            },
        ),
        ("dense", EPOCH),
        ("moe", {**ROLLOUTS, "bf16": True, "offload_teacher": True, "offload_optimizer": True}),
    ],
    ids=[
        "opdlm",
        "moe",
        "next_token",
        "bf16",
        "off_policy",
        "mixture",
        "scp",
        "sft",
        "opdlm_off",
        "groups",
        "groups distributed",
        "off_policy stored",
        "epoch",
        "offloaded",
    ],
)
def test_resumed_equals_uninterrupted_bit_for_bit(
    folder: Path,
    whole_runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    options: dict[str, Any],
) -> None:
    whole, expected = _whole(folder, whole_runs, model, options)
    assert len(expected) == 6
    # Dies in the middle of the third batch; the newest checkpoint is that of the second.
    broken = str(tmp_path / "broken")
    interrupted = _config(folder, folder / model, **options, save=broken, save_interval=1)
    _interrupt_after(monkeypatch, 5, interrupted)
    run_training(interrupted)  # the same command
    check_same(Path(broken), whole)


def _start(rank: int, folder: Path, run: str, model: str, options: dict[str, Any]) -> None:
    """Train the first four of six updates."""
    first = {"num_rollouts": 2} if "num_rollouts" in options else {"train_iters": 4}
    options = {**options, **first, "lr_decay_iters": 6}
    with reward_every_third():
        run_training(_config(folder, folder / model, **options, save=run))


def _go_on(rank: int, folder: Path, run: str, model: str, options: dict[str, Any]) -> Any:
    with reward_every_third():
        return run_training(_config(folder, Path(run), **options, save=run))


def _check_moved(
    folder: Path,
    whole_runs: dict[str, Path],
    save: Path,
    model: str,
    before: dict[str, Any],
    after: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Compare a run that changes its layout with one of a single process."""
    _, expected = _whole(folder, whole_runs, model, options)
    run = str(save / "moved")
    run_distributed(_start, 2, folder, run, model, {**options, **before})
    lines = run_distributed(_go_on, 2, folder, run, model, {**options, **after})[0]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_goes_on_at_another_layout(
    folder: Path, whole_runs: dict[str, Path], tmp_path: Path, objective: str
) -> None:
    model = "diffusion" if objective == "d_opsd" else "dense"
    options = {**OBJECTIVES[objective], "objective": objective}
    before, after = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
    _check_moved(folder, whole_runs, tmp_path, model, before, after, options)


@pytest.mark.parametrize(
    ("model", "before", "after", "options"),
    [
        ("dense", {"use_distributed_optimizer": True}, {"tensor_model_parallel_size": 2}, {}),
        ("moe", {"expert_model_parallel_size": 2}, VIRTUAL_STAGES, {}),
        (
            "moe",
            {**VIRTUAL_STAGES, "use_distributed_optimizer": True},
            {"expert_model_parallel_size": 2},
            {},
        ),
        ("dense", {"tensor_model_parallel_size": 2}, {}, ADAPTERS),
        ("moe", {"expert_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, ADAPTERS),
    ],
    ids=[
        "DP2 distributed to TP2",
        "EP2 to PP2 V2",
        "PP2 V2 to EP2 distributed",
        "adapters TP2 to DP2",
        "adapters EP2 to PP2",
    ],
)
def test_a_run_goes_on_at_another_layout(
    folder: Path,
    whole_runs: dict[str, Path],
    tmp_path: Path,
    model: str,
    before: dict[str, Any],
    after: dict[str, Any],
    options: dict[str, Any],
) -> None:
    # The distributed optimizer's state has its own format: it is kept through the move.
    keep = {key: value for key, value in before.items() if key == "use_distributed_optimizer"}
    options = {**ROLLOUTS, **options}
    _check_moved(folder, whole_runs, tmp_path, model, before, {**keep, **after}, options)


def test_what_a_resumed_run_cannot_change_is_refused(folder: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    run_training(_config(folder, folder / "dense", **ROLLOUTS, save=run))
    changed = _config(folder, folder / "dense", **{**ROLLOUTS, "seed": 7}, save=run)
    with pytest.raises(UserError, match=r"--seed \(then 1234, now 7\).*--finetune"):
        run_training(changed)


def test_finetune_starts_a_new_run_from_the_weights(folder: Path, tmp_path: Path) -> None:
    first = str(tmp_path / "first")
    run_training(_config(folder, folder / "dense", **ROLLOUTS, save=first))
    second = _config(
        folder,
        Path(first),
        **{**ROLLOUTS, "num_rollouts": 1, "lr_warmup_iters": 0, "seed": 7},
        finetune=True,
        teacher_load=str(folder / "dense"),
        save=str(tmp_path / "second"),
    )
    lines = run_training(second)
    assert [line["step"] for line in lines] == [1, 2]
    config = json.loads((find_checkpoint(tmp_path / "second") / "hf" / "config.json").read_text())
    assert config["block_size"] == 4
    assert config["mask_token_id"] == 511
