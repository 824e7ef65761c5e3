"""Adapters against `transformers` with the product added to its weights by hand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_dlm.config import Config
from megatron_dlm.conversion.hf_export import export_hf
from megatron_dlm.models.architecture import Architecture, read_architecture
from megatron_dlm.models.attention_layout import clean_layout
from megatron_dlm.models.forward import Row, forward_hidden
from megatron_dlm.models.lora import (
    adapters_disabled,
    attach_adapters,
    merge_adapters,
    train_adapters_only,
)
from megatron_dlm.models.model import DiffusionGPTModel, head_weight
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.training.model_source import open_model_source
from tests.tiny import save_random_model

pytestmark = pytest.mark.usefixtures("single_process")
RANK, ALPHA = 3, 12.0
TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])


@pytest.fixture(params=["dense", "moe"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_random_model(tmp_path / "source", moe=request.param == "moe")


def _model(source: Path) -> tuple[DiffusionGPTModel, Architecture]:
    architecture = read_architecture(source)
    model = build_model(architecture, Config.from_dict({"device": "cpu"}))
    open_model_source(str(source), "--load").load_into(model)
    return model.eval(), architecture


def _attach(model: DiffusionGPTModel, targets: tuple[str, ...] = TARGETS) -> None:
    attach_adapters(model, rank=RANK, alpha=ALPHA, target_modules=targets, seed=7)


def _logits(model: DiffusionGPTModel) -> torch.Tensor:
    layout = clean_layout([len(TOKENS)], "causal", 1)
    hidden = forward_hidden(model, [Row(TOKENS, torch.arange(len(TOKENS)), layout)])
    assert hidden is not None
    return (hidden[0] @ head_weight(model).detach().T)[:, :512]


def _train(model: DiffusionGPTModel) -> None:
    """Stand in for an optimizer: give every B some value."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(".lora_b"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05


def _merged_by_hand(model: DiffusionGPTModel, source: Path, target: Path) -> torch.nn.Module:
    """The source's tensors plus (alpha / r) B A, read from the layers under Megatron's names."""
    tensors = load_file(source / "model.safetensors")
    delta = {
        name.removesuffix(".lora_a"): ALPHA
        / RANK
        * (model.get_parameter(name.removesuffix("a") + "b") @ parameter)
        for name, parameter in model.state_dict().items()
        if name.endswith(".lora_a")
    }
    for name, product in delta.items():
        layer, _, rest = name.removeprefix("decoder.layers.").partition(".")
        prefix = f"model.layers.{layer}."
        if rest == "self_attention.linear_qkv":
            # Two groups of two query heads, a key head and a value head of eight rows each.
            grouped = product.view(2, 4, 8, -1)
            for part, rows in (
                ("q_proj", grouped[:, :2]),
                ("k_proj", grouped[:, 2:3]),
                ("v_proj", grouped[:, 3:]),
            ):
                tensors[f"{prefix}self_attn.{part}.weight"] += rows.reshape(-1, product.shape[1])
        elif rest == "self_attention.linear_proj":
            tensors[f"{prefix}self_attn.o_proj.weight"] += product
        else:
            of_experts = ".experts." in rest
            for expert, part in enumerate(product if of_experts else product[None]):
                mlp = f"{prefix}mlp.experts.{expert}" if of_experts else f"{prefix}mlp"
                if rest.endswith("linear_fc1"):
                    gate, up = part.chunk(2)
                    tensors[f"{mlp}.gate_proj.weight"] += gate
                    tensors[f"{mlp}.up_proj.weight"] += up
                else:
                    tensors[f"{mlp}.down_proj.weight"] += part
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(target).eval()


def test_a_new_adapter_changes_nothing(source: Path) -> None:
    model, _ = _model(source)
    before = _logits(model)
    _attach(model)
    assert torch.equal(_logits(model), before)


def test_adapted_merged_and_exported_equal_transformers(source: Path, tmp_path: Path) -> None:
    model, architecture = _model(source)
    base = _logits(model)
    _attach(model)
    _train(model)
    adapted = _logits(model)
    reference = _merged_by_hand(model, source, tmp_path / "by_hand")
    with torch.no_grad():
        expected = reference(TOKENS[None]).logits[0]
    assert float((expected - base).abs().max()) > 0.1
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)
    with adapters_disabled(model):
        assert torch.equal(_logits(model), base)
    assert torch.equal(_logits(model), adapted)
    merge_adapters(model)
    torch.testing.assert_close(_logits(model), adapted, rtol=1e-4, atol=1e-4)
    export_hf(model, architecture, tmp_path / "exported", format="autoregressive")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "by_hand" / "model.safetensors").items():
        torch.testing.assert_close(exported[name], tensor, rtol=1e-5, atol=1e-6)


def test_only_adapters_of_the_named_layers_are_trained(source: Path) -> None:
    model, _ = _model(source)
    _attach(model, ("linear_proj",))
    train_adapters_only(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"decoder.layers.{layer}.self_attention.linear_proj.lora_{part}"
        for layer in (0, 1)
        for part in "ab"
    }


def test_every_layer_starts_from_its_own_draw(source: Path) -> None:
    model, _ = _model(source)
    _attach(model, ("linear_proj",))
    again, _ = _model(source)
    _attach(again, ("linear_proj",))
    first, second = (
        model.get_parameter(f"decoder.layers.{layer}.self_attention.linear_proj.lora_a")
        for layer in (0, 1)
    )
    assert not torch.equal(first, second)
    assert float(first.detach().abs().max()) <= 32**-0.5
    for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name
