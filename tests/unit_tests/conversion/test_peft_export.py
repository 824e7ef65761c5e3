"""Adapters in PEFT's format: PEFT loads them and computes the logits of the merged export."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_dlm.config import Config
from megatron_dlm.conversion.hf_import import load_hf_weights
from megatron_dlm.models.architecture import read_architecture
from megatron_dlm.models.lora import attach_adapters
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.parallel import initialized
from megatron_dlm.training.checkpoint_saving import save_checkpoint
from tests.unit_tests.conversion.hf_models import random_hf_model, save_hf_model
from tests.unit_tests.conversion.megatron_models import random_tokens
from tests.unit_tests.conversion.tokenizers import MASK_TOKEN_ID, save_tokenizer

ALL_LAYERS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
BLOCK_DIFFUSION = {"attention_pattern": "block_causal", "shifted": False, "block_size": 4}


def save_run(
    folder: Path,
    *,
    moe: bool = False,
    family: str = "qwen3",
    diffusion: bool = True,
    changes_mask: bool = False,
    target_modules: tuple[str, ...] = ALL_LAYERS,
) -> Path:
    """A run folder with random adapters on random weights, and its source beside it."""
    source = save_hf_model(random_hf_model(moe=moe, family=family, tied=not moe), folder / "source")
    save_tokenizer(source)
    options: dict[str, Any] = dict(lora_rank=3, lora_alpha=6.0, seed=5, load=str(source))
    options |= dict(lora_target_modules=target_modules, lora_dropout=0.1)
    architecture = read_architecture(source)
    if diffusion:
        architecture = replace(architecture, hf_config=architecture.hf_config | BLOCK_DIFFUSION)
    with initialized(Config()):
        model = build_model(architecture, Config())
        load_hf_weights(model, architecture, source)
        attach_adapters(model, rank=3, alpha=6.0, target_modules=target_modules, seed=5)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_b"):
                    parameter.uniform_(-0.1, 0.1, generator=generator)
            if changes_mask:
                model.embedding.word_embeddings.weight[MASK_TOKEN_ID] = 0.5
        save_checkpoint(
            folder / "run",
            model,
            hf_config=architecture.hf_config,
            tokenizer_folder=source,
            run_config=options,
        )
    return folder / "run"


@dataclass(frozen=True)
class Case:
    """A kind of run, and the format of its base model."""

    format: str
    options: dict[str, Any]


CASES = {
    "dense": Case("sdar", dict(changes_mask=True)),
    "moe": Case("sdar", dict(moe=True)),
    "autoregressive": Case("autoregressive", dict(diffusion=False)),
    "autoregressive moe": Case("autoregressive", dict(moe=True, diffusion=False)),
    "qwen2": Case("a2d-qwen2", dict(family="qwen2", changes_mask=True)),
    "llama": Case("a2d-llama", dict(family="llama")),
    "mistral": Case("a2d-mistral", dict(family="mistral")),
    "autoregressive qwen2": Case("autoregressive", dict(family="qwen2", diffusion=False)),
    "autoregressive llama": Case("autoregressive", dict(family="llama", diffusion=False)),
    "attention alone": Case("sdar", dict(moe=True, target_modules=ALL_LAYERS[:2])),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_peft_computes_what_the_merged_export_does(tmp_path, convert, name):
    from peft import PeftModel

    case, tokens = CASES[name], random_tokens()[None]
    noisy = tokens.clone()
    noisy[0, ::3] = MASK_TOKEN_ID
    run = save_run(tmp_path, **case.options)
    base, merged, adapter = (tmp_path / folder for folder in ("base", "merged", "adapter"))
    common = ("--load", run, "--target-format", case.format)
    for arguments in (
        (*common, "--save", base, "--without-adapters"),
        (*common, "--save", merged),
        ("--load", run, "--save", adapter, "--target-format", "peft", "--base-model", base),
    ):
        assert convert(*arguments) == (0, "")

    plain, expected, alone = (
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        for folder in (base, merged, base)
    )
    model = PeftModel.from_pretrained(plain, adapter).eval()
    with torch.no_grad():
        found, target, before = (each(input_ids=noisy).logits for each in (model, expected, alone))
        with model.disable_adapter():
            assert torch.equal(model(input_ids=noisy).logits, before)
    assert (target - before).abs().max() > 0.1
    torch.testing.assert_close(found, target, rtol=0, atol=2e-5)
    answers = [each.generate(input_ids=tokens, max_new_tokens=6) for each in (model, expected)]
    assert torch.equal(*answers)
    # transformers, too, finds the base model by itself.
    whole = AutoModelForCausalLM.from_pretrained(adapter, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(input_ids=noisy).logits, target, rtol=0, atol=2e-5)


def test_what_a_folder_holds(tmp_path, convert):
    """The names, sizes and settings that PEFT's own folders have; the run's source is the base."""
    run = save_run(tmp_path, diffusion=False)
    adapter = tmp_path / "adapter"
    assert convert("--load", run, "--save", adapter, "--target-format", "peft") == (0, "")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6.0)
    assert config["lora_dropout"] == 0.1
    assert config["base_model_name_or_path"] == str(tmp_path / "source")
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert set(config["target_modules"]) == {*attention, "gate_proj", "up_proj", "down_proj"}
    tensors = load_file(adapter / "adapter_model.safetensors")
    weights = load_file(tmp_path / "source" / "model.safetensors")
    expected = {}
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            expected[f"{layer}.lora_A.weight"] = (3, weight.shape[1])
            expected[f"{layer}.lora_B.weight"] = (weight.shape[0], 3)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    # Whoever may read the settings may read the weights.
    assert len({file.stat().st_mode for file in adapter.iterdir() if file.is_file()}) == 1


def _refusal(convert, *arguments) -> str:
    status, error = convert(*arguments)
    assert status == 2
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    return line


def test_what_cannot_be_written_is_refused(tmp_path, convert):
    run, out = save_run(tmp_path, changes_mask=True), tmp_path / "out"
    source, base = tmp_path / "source", tmp_path / "base"
    peft = ("--load", run, "--save", out, "--target-format", "peft")
    # The run attends by blocks; its source is autoregressive.
    assert "an autoregressive model, and the run's is not" in _refusal(convert, *peft)
    # A base of the right kind with the source's row of MASK.
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | BLOCK_DIFFUSION))
    line = _refusal(convert, *peft)
    assert "other values of model.embed_tokens.weight than under the adapters" in line
    assert "--without-adapters" in line
    (source / "config.json").write_text(json.dumps(config | BLOCK_DIFFUSION | {"block_size": 8}))
    assert "has block_size 8, the run 4" in _refusal(convert, *peft)

    other = ("--load", source, "--save", out, "--target-format")
    assert "holds no adapters" in _refusal(convert, *other, "peft")
    assert "holds no adapters" in _refusal(convert, *other, "autoregressive", "--without-adapters")
    assert "only peft names one" in _refusal(
        convert, *other, "autoregressive", "--base-model", base
    )
    assert "the adapters alone" in _refusal(convert, *peft, "--without-adapters")
    assert not out.exists()
