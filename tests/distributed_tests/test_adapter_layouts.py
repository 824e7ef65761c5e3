"""Adapters, and the objective made for them, train under every layout like one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_dlm.config import Config
from megatron_dlm.conversion.hf_export import export_hf
from megatron_dlm.conversion.peft_export import AdapterSettings, export_peft
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.parallel import initialized
from megatron_dlm.training.model_source import open_model_source
from tests.distributed_tests.layouts import (
    DISTRIBUTED_OPTIMIZER,
    EP,
    ETP,
    PP,
    RECOMPUTATION,
    SP,
    TP,
    Layout,
)
from tests.distributed_tests.spawn import run_distributed
from tests.tiny import (
    declare_diffusion_kind,
    reward_every_third,
    run_config,
    run_training,
    save_random_model,
    write_data,
)

LENGTH = dict(rollout_batch_size=12)
"""Three updates."""
ADAPTERS = dict(lora_rank=3, lora_alpha=6, lora_dropout=0.3)
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "adapters": ("dense", dict(ADAPTERS, micro_batch_size=2)),
    "d_opsd": (
        "block_causal",
        dict(ADAPTERS, objective="d_opsd"),
    ),
    # Rows of ranks are cut into unequal numbers of parts. Of seed 0, a teacher's 20th and 21st
    # token are equally likely to 1e-7, and layouts differ in which one they keep.
    "d_opsd full copy": ("full", dict(objective="d_opsd", max_tokens_per_micro_batch=300, seed=1)),
    "moe d_opsd": ("moe", dict(objective="d_opsd", lora_rank=3, max_tokens_per_micro_batch=300)),
}
"""Model and options by name; without adapters d_opsd has a frozen copy of the model."""

UNCONVERTED = {"d_opsd": 2.0, "moe d_opsd": 1.0}
"""Runs whose adapters' base model is what they were loaded from, with alpha / r."""

LAYOUTS: dict[str, Layout] = {
    "TP2 SP": Layout(2, "dense", {TP: 2, **SP}),
    "PP2": Layout(2, "dense", {PP: 2, **RECOMPUTATION}),
    "DP2": Layout(2, "dense", DISTRIBUTED_OPTIMIZER),
    "moe EP2": Layout(2, "moe", {EP: 2}),
    "moe PP2": Layout(2, "moe", {PP: 2}),
    "moe EP2 TP2 SP": Layout(2, "moe", {EP: 2, TP: 2, ETP: 1, **SP}),
    "TP2 PP2 SP": Layout(4, "dense", {TP: 2, PP: 2, **SP}),
}
KEYS = ("supervised_tokens", "response_tokens_total", "tokens_per_forward", "accuracy")


def _train(rank: int, folder: Path, runs: list[tuple[str, dict[str, Any]]], prefix: str) -> Any:
    """Train each run, then load its checkpoint without adapters and export it; metrics lines."""
    results = {}
    for name, layout in runs:
        model, options = RUNS[name]
        save = _run(folder, prefix, name)
        if options.get("objective") == "d_opsd" and "lora_rank" not in options:
            options = dict(options, teacher_load=str(folder / model))
        config = run_config(folder, folder / model, save=str(save), **LENGTH, **options, **layout)
        with reward_every_third():
            results[name] = run_training(config)
        _export(config, save, save / "hf")
        layouts = {"": config}
        if prefix == "moe EP2":  # what merges or writes them may split experts
            layouts["_split"] = Config.from_dict({TP: 2, **SP, "device": "cpu"})
            _export(layouts["_split"], save, save / "hf_split")
        if name in UNCONVERTED:
            adapters = AdapterSettings.of_run(config.to_dict(), str(save))
            for suffix, of_export in layouts.items():
                _export_peft(of_export, adapters, save, folder / model, save / f"peft{suffix}")
    return results


def _export(config: Config, run: Path, target: Path) -> None:
    source = open_model_source(str(run), "--load")
    with initialized(config):
        model = build_model(source.architecture, config)
        source.load_into(model)
        export_hf(model, source.architecture, target, format="autoregressive")


def _export_peft(
    config: Config, adapters: AdapterSettings, run: Path, base: Path, target: Path
) -> None:
    source = open_model_source(str(run), "--load")
    with initialized(config):
        model = build_model(source.architecture, config)
        source.load_into(model, "keep")
        export_peft(
            model,
            source.architecture,
            target,
            adapters=adapters,
            base=open_model_source(str(base), "--base-model"),
            dtype=torch.float32,
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_data(folder)
    for name in ("dense", "block_causal", "full", "moe"):
        save_random_model(folder / name, moe=name == "moe")
    declare_diffusion_kind(folder / "block_causal", "block_causal", shifted=False)
    declare_diffusion_kind(folder / "moe", "block_causal", shifted=False)
    declare_diffusion_kind(folder / "full", "full", shifted=True)
    return folder


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, list[dict[str, Any]]]:
    runs = [(name, {}) for name in RUNS]
    return run_distributed(_train, 1, folder, runs, "single", timeout_seconds=300)[0]


def _run(folder: Path, prefix: str, name: str) -> Path:
    return folder / f"{prefix}-{name}".replace(" ", "_")


def _weights(run: Path, export: str = "hf") -> dict[str, torch.Tensor]:
    return load_file(run / export / "model.safetensors")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_like_one_process(folder: Path, single: dict[str, Any], name: str) -> None:
    layout = LAYOUTS[name]
    runs = [run for run in RUNS if run.startswith("moe") == (layout.model == "moe")]
    started = [(run, layout.options) for run in runs]
    results = run_distributed(_train, layout.processes, folder, started, name, timeout_seconds=300)[
        0
    ]
    for run in runs:
        assert len(results[run]) == len(single[run]) == 3
        for line, expected in zip(results[run], single[run], strict=True):
            assert [line[key] for key in KEYS] == [expected[key] for key in KEYS], run
            for key in ("loss", "grad_norm"):
                assert line[key] == pytest.approx(expected[key], rel=1e-4), run
        save, reference = _run(folder, name, run), _weights(_run(folder, "single", run))
        # One process merges the adapters of any layout.
        _export(Config.from_dict({"device": "cpu"}), save, save / "hf_single")
        for export in ("hf", "hf_single", *(["hf_split"] if name == "moe EP2" else [])):
            weights = _weights(save, export)
            assert weights.keys() == reference.keys()
            for key, tensor in reference.items():
                torch.testing.assert_close(weights[key], tensor, rtol=0, atol=2e-5)
        if run in UNCONVERTED:
            base = load_file(folder / RUNS[run][0] / "model.safetensors")
            adapters = load_file(save / "peft" / "adapter_model.safetensors")
            if name == "moe EP2":
                split = load_file(save / "peft_split" / "adapter_model.safetensors")
                assert split.keys() == adapters.keys()
                assert all(torch.equal(split[key], adapters[key]) for key in adapters)
            for key, weight in base.items():
                layer = f"base_model.model.{key.removesuffix('.weight')}"
                if key.endswith("_proj.weight"):
                    lora_a = adapters.pop(f"{layer}.lora_A.weight")
                    lora_b = adapters.pop(f"{layer}.lora_B.weight")
                    weight = weight + UNCONVERTED[run] * lora_b @ lora_a
                torch.testing.assert_close(weight, reference[key], rtol=0, atol=2e-5)
            assert not adapters


def test_runs_are_what_they_are_meant_to_be(
    folder: Path, single: dict[str, list[dict[str, Any]]]
) -> None:
    """Some but not all first answers are right, and every objective moves the weights."""
    for name, (model, options) in RUNS.items():
        if "objective" in options:
            assert 0 < single[name][0]["accuracy"] < single[name][0]["solved_rate"]
        before = load_file(folder / model / "model.safetensors")
        after = _weights(_run(folder, "single", name))
        moved = {key for key, tensor in before.items() if not torch.equal(after[key], tensor)}
        if "lora_rank" in options:
            assert any(key.endswith("_proj.weight") for key in moved)
            rest = {key for key in moved if not key.endswith("_proj.weight")}
            # A conversion gives MASK a row, which no adapter trains.
            assert rest == ({"model.embed_tokens.weight"} if name == "adapters" else set())
    config = json.loads((folder / "single-d_opsd" / "iter_0000003/hf/config.json").read_text())
    assert (config["attention_pattern"], config["block_size"]) == ("block_causal", 4)
