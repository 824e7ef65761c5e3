"""Dropout of an adapter's inputs: the right share, the same under every split of the layer."""

import pytest
import torch
import torch.nn.functional as F

from megatron_dlm.config import Config
from megatron_dlm.models.adapter_dropout import drop_inputs, kept_inputs
from megatron_dlm.models.architecture import read_architecture
from megatron_dlm.models.attention_layout import clean_layout
from megatron_dlm.models.lora import attach_adapters, drop_out_adapter_inputs
from megatron_dlm.models.lora_layers import LoRAColumnParallelLinear
from megatron_dlm.models.model_provider import build_model
from tests.tiny import save_random_model

KEYS = torch.randint(0, 2**31 - 1, (400,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dropout", [0.05, 0.5])
def test_inputs_are_dropped_independently(dropout: float) -> None:
    kept = kept_inputs(KEYS, 12345, 0, 500, dropout).double()
    assert float(kept.mean()) == pytest.approx(1 - dropout, abs=3e-3)
    for axis in (0, 1):  # no token and no input is dropped more often than chance has it
        count = kept.shape[axis]
        spread = float((kept.mean(axis) - (1 - dropout)).std())
        assert spread == pytest.approx((dropout * (1 - dropout) / count) ** 0.5, rel=0.15)
    centred = kept - kept.mean()
    for other in (kept.roll(1, 0), kept.roll(1, 1), kept_inputs(KEYS, 12346, 0, 500, dropout)):
        correlation = (centred * (other.double() - kept.mean())).mean() / centred.var()
        assert abs(float(correlation)) < 0.01


def test_parts_of_a_layer_drop_what_the_whole_does() -> None:
    inputs = torch.randn(400, 1, 32)
    whole = drop_inputs(inputs, KEYS, 7, 0, 0.3, 0)
    right = drop_inputs(inputs[..., 16:], KEYS, 7, 16, 0.3, 1)
    assert torch.equal(whole[..., 16:], right)
    later = drop_inputs(inputs[200:], KEYS, 7, 0, 0.3, 1)  # sequence parallelism
    assert torch.equal(whole[200:], later)
    kept = whole != 0
    torch.testing.assert_close(whole[kept], inputs[kept] / 0.7)
    assert kept_inputs(KEYS[:0], 7, 0, 32, 0.3).shape == (0, 32)


@pytest.mark.usefixtures("single_process")
def test_only_the_adapter_of_a_model_in_training_loses_inputs(
    tmp_path: pytest.TempPathFactory,
) -> None:
    source = save_random_model(tmp_path / "source")  # type: ignore[operator]
    config = Config.from_dict({"device": "cpu"})
    model = build_model(read_architecture(source), config)
    attach_adapters(model, rank=3, alpha=6.0, target_modules=["linear_qkv"], seed=7)
    drop_out_adapter_inputs(model, 0.4, seed=7)
    layer = model.decoder.layers[1].self_attention.linear_qkv
    assert isinstance(layer, LoRAColumnParallelLinear)
    assert layer.lora_a is not None
    assert layer.lora_b is not None
    torch.nn.init.normal_(layer.lora_b)
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
    layer.register_forward_hook(
        lambda module, arguments, output: seen.append(
            (arguments[0].detach(), output[0].detach(), module.token_keys)
        )
    )
    tokens = torch.arange(12)[None]
    keys = KEYS[:12].int()
    layout = torch.cat((clean_layout([12], "causal", 1), keys[None]))
    model.train()
    model(tokens, tokens, layout)
    model.eval()
    model(tokens, tokens, layout)
    model(tokens, tokens, layout[:4])
    for (inputs, output, _), dropout in zip(seen, (0.4, 0.0, 0.0), strict=True):
        kept = kept_inputs(keys, layer.dropout_salt, 0, inputs.shape[-1], dropout)[:, None]
        low = F.linear(inputs * kept / (1 - dropout), layer.lora_a)
        expected = F.linear(inputs, layer.weight) + 2.0 * F.linear(low, layer.lora_b)
        torch.testing.assert_close(output, expected)
    assert 0.5 < float(kept_inputs(keys, layer.dropout_salt, 0, 32, 0.4).float().mean()) < 0.7
    assert seen[0][2] is not None
    assert layer.token_keys is None  # nothing is left behind for another row
