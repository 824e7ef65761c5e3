"""A teacher in bfloat16 or in 8-bit floats beside a student in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_dlm.accounting.live_memory import LiveMemory
from megatron_dlm.config import Config
from megatron_dlm.models import fp8_weights
from megatron_dlm.models.forward import clean_row, forward_hidden
from megatron_dlm.models.fp8_weights import (
    E4M3,
    Fp8ParallelLinear,
    in_fp8,
    linear_layers,
    to_fp8,
)
from megatron_dlm.models.lora import attach_adapters, merge_adapters
from megatron_dlm.models.model import DiffusionGPTModel, head_weight
from megatron_dlm.models.model_provider import build_frozen_model
from megatron_dlm.parallel import initialized
from megatron_dlm.teacher.loading import load_teacher
from megatron_dlm.training.checkpoint_saving import save_checkpoint
from megatron_dlm.training.model_source import ModelSource, open_model_source
from tests.tiny import save_random_model

TOKENS = torch.arange(3, 64)
WIDE = dict(
    initializer_range=0.09, hidden_size=128, intermediate_size=256, head_dim=32, vocab_size=512
)

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("precision")
    for moe in (False, True):
        # About 1 / sqrt(hidden size), as of trained models: larger weights amplify every rounding.
        sizes: dict[str, Any] = dict(WIDE, moe_intermediate_size=64) if moe else WIDE
        save_random_model(folder / ("moe" if moe else "dense"), moe=moe, **sizes)
    return folder


def teacher(folder: Path, precision: str) -> tuple[DiffusionGPTModel, Tensor]:
    """A model, and its log-probabilities of the token after each, [S, V]."""
    config = Config.from_dict({"teacher_precision": precision, "device": "cpu"})
    with initialized(config):
        model = load_teacher(open_model_source(str(folder), "--teacher-load"), config)
        [hidden] = forward_hidden(model, [clean_row([TOKENS], "causal")]) or []
        logits = hidden.float() @ head_weight(model)[: model.num_tokens].float().T
    return model, logits.log_softmax(-1)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's weights on this rank, scales included."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def divergence(log_p: Tensor, log_q: Tensor) -> float:
    """Mean KL(p || q) of the rows."""
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_less_precise_teachers_say_nearly_the_same_in_less_memory(folder: Path, kind: str) -> None:
    original = AutoModelForCausalLM.from_pretrained(folder / kind).eval()
    with torch.no_grad():
        log_p = original(TOKENS[None]).logits[0].double().log_softmax(-1)
    found = {name: teacher(folder / kind, name) for name in ("fp32", "bf16", "fp8")}
    far = {name: divergence(log_p, log_q.double()) for name, (_, log_q) in found.items()}
    assert abs(far["fp32"]) < 1e-7 < far["bf16"] < far["fp8"]
    assert far["bf16"] < 1e-3
    assert far["fp8"] < 2e-2

    layers = {name: weight_bytes(model.decoder) for name, (model, _) in found.items()}
    whole = {name: weight_bytes(model) for name, (model, _) in found.items()}
    assert layers["bf16"] * 2 == layers["fp32"]
    # A scale of 4 bytes for each output beside norms and router: little, but not of such layers.
    assert layers["fp8"] < 0.56 * layers["bf16"]
    assert whole["bf16"] - whole["fp8"] == layers["bf16"] - layers["fp8"]
    kept = {buffer.dtype for buffer in found["fp8"][0].buffers()}
    assert E4M3 in kept


def save_run(folder: Path, source: ModelSource, model: DiffusionGPTModel) -> ModelSource:
    """The weights as those of a run that has trained adapters of them."""
    options = dict(lora_rank=3, lora_alpha=6.0, lora_target_modules=TARGETS, seed=5)
    attach_adapters(model, rank=3, alpha=6.0, target_modules=TARGETS, seed=5)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.uniform_(-0.1, 0.1, generator=generator)
    hf = dict(hf_config=source.architecture.hf_config, tokenizer_folder=source.hf_folder)
    save_checkpoint(folder, model, run_config=options, **hf)
    merge_adapters(model)
    return open_model_source(str(folder), "--teacher-load")


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.slow
def test_weights_are_rounded_one_tensor_at_a_time(folder: Path, kind: str) -> None:
    """At no moment is more there than the finished model and a few tensors beside it."""
    config = Config.from_dict({"teacher_precision": "fp8", "device": "cpu"})
    sizes: dict[str, Any] = dict(WIDE, num_hidden_layers=16, moe_intermediate_size=64)
    deep = save_random_model(folder / f"{kind}_deep", moe=kind == "moe", **sizes)
    hf = open_model_source(str(deep), "--teacher-load")
    with initialized(config):
        for of_run in (False, True):
            whole = build_frozen_model(hf.architecture, config.of_teacher())
            hf.load_into(whole)
            source = save_run(folder / f"{kind}_run", hf, whole) if of_run else hf
            with LiveMemory(on_host=True) as memory:
                model = load_teacher(source, config)
            kept, unrounded = weight_bytes(model), weight_bytes(whole)
            for parent, name, layer in linear_layers(whole):
                setattr(parent, name, in_fp8(layer))
            largest = max(p.numel() for p in (*whole.parameters(), *whole.buffers()))
            # One tensor as it is made, or read, widened, divided and cut: five times in float32.
            assert memory.most < kept + 20 * largest
            assert memory.most < unrounded
            expected = whole.state_dict()
            assert model.state_dict().keys() == expected.keys()
            for name, tensor in model.state_dict().items():
                if tensor is not None:
                    assert torch.equal(tensor.float(), expected[name].float()), name


def test_every_value_is_as_near_as_stated() -> None:
    weight = torch.randn(64, 300, dtype=torch.float64) * torch.logspace(-4, 2, 64)[:, None]
    weight[3] = 0
    values, scale = to_fp8(weight)
    error = (values.double() * scale - weight).abs()
    assert bool((error <= torch.maximum(weight.abs() / 16, scale.double() / 1024)).all())
    assert values.dtype == E4M3
    assert values.element_size() == 1


@pytest.mark.parametrize("bias", [False, True])
def test_products_in_8_bits_are_as_near_as_their_rounding(
    monkeypatch: pytest.MonkeyPatch, bias: bool
) -> None:
    """What GPUs multiply; PyTorch's CPU version of the same operation stands for them here."""
    with initialized(Config.from_dict({"device": "cpu"})):
        layer = ColumnParallelLinear(
            96,
            64,
            config=ModelParallelConfig(params_dtype=torch.bfloat16),
            init_method=torch.nn.init.normal_,
            bias=bias,
        )
        inputs = (torch.randn(5, 1, 96) * torch.logspace(-3, 3, 5)[:, None, None]).bfloat16()
        with torch.no_grad():
            layer.weight.copy_(torch.randn(64, 96))
            if bias:
                layer.bias.copy_(torch.randn(64))
        replacement = Fp8ParallelLinear(layer)
        expected = inputs.double() @ layer.weight.double().T
        expected += layer.bias.double() if bias else 0
        widened, _ = replacement(inputs)
        monkeypatch.setattr(fp8_weights, "_multiplies", lambda *_: True)
        multiplied, rest = replacement(inputs)
    assert rest is None
    assert multiplied.dtype == torch.bfloat16
    assert not torch.equal(multiplied, widened)  # it also rounds its inputs
    size = inputs.double().norm(dim=-1, keepdim=True) * layer.weight.double().norm(dim=-1)
    for output in (widened, multiplied):
        assert bool(((output.double() - expected).abs() < 0.05 * size + 0.02).all())
