"""The last layer goes on with the tokens that are read: the same values, for less work."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_dlm.accounting.flops import BACKWARD, ForwardFlops
from megatron_dlm.config import Config
from megatron_dlm.models.architecture import architecture_from_hf
from megatron_dlm.models.attention_layout import clean_layout
from megatron_dlm.models.forward import Row, forward_hidden
from megatron_dlm.models.lora import attach_adapters, drop_out_adapter_inputs
from megatron_dlm.models.model import DiffusionGPTModel, read_hidden_states
from megatron_dlm.models.model_provider import build_model
from tests.tiny import DENSE, MOE

pytestmark = pytest.mark.usefixtures("single_process")

TOKENS = 24


def _model(sizes: dict[str, Any] = DENSE, **options: Any) -> DiffusionGPTModel:
    kind = {"model_type": "qwen3_moe" if sizes is MOE else "qwen3", "rope_theta": 1e4}
    architecture = architecture_from_hf({**kind, **sizes})
    model = build_model(architecture, Config.from_dict({"device": "cpu", "seed": 1, **options}))
    assert isinstance(model, DiffusionGPTModel)
    return model.train()


def _row() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    layout = clean_layout([TOKENS - 7, 7], "block_causal", 4)
    ids = torch.randint(0, 60, (1, TOKENS), generator=generator)
    return dict(input_ids=ids, position_ids=layout[3].long()[None], attention_mask=layout)


def _gradients(model: DiffusionGPTModel, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weights = torch.arange(1.0, hidden.numel() + 1).view_as(hidden).cos()
    (hidden * weights).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("read", [[], [3], [23, 0, 11, 12], list(range(TOKENS))])
@pytest.mark.parametrize("recomputation", ["none", "selective", "full"])
def test_values_and_gradients_are_those_of_the_whole_row(
    read: list[int], recomputation: str
) -> None:
    options = dict(recompute_granularity=recomputation)
    model = _model(**({} if recomputation == "none" else options))
    assert model.reads_early
    places = torch.tensor(read, dtype=torch.int64)
    whole = model(**_row())[places, 0]
    expected = _gradients(model, whole)
    output = model(**_row(), read=places)
    assert len(output) == (len(read) or TOKENS)
    hidden = read_hidden_states(model, output, places)
    torch.testing.assert_close(hidden, whole, rtol=1e-5, atol=1e-6)
    gradients = _gradients(model, hidden)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_rows_without_gradients_are_read_like_that_too() -> None:
    model = _model().eval()
    row = _row()
    layout, ids = row["attention_mask"], row["input_ids"][0]
    places = torch.tensor([5, 2, 20])
    whole, read = (Row(ids, layout[3].long(), layout, chosen) for chosen in (None, places))
    (expected,) = forward_hidden(model, [whole]) or []
    (hidden,) = forward_hidden(model, [read]) or []
    torch.testing.assert_close(hidden, expected[places], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["experts", "dropout of adapters"])
def test_layers_that_need_the_whole_row_have_it(kind: str) -> None:
    model = _model(MOE) if kind == "experts" else _model()
    if kind != "experts":
        attach_adapters(model, rank=2, alpha=2.0, target_modules=("linear_fc1",), seed=1)
        drop_out_adapter_inputs(model, 0.5, seed=1)
    assert not model.reads_early
    places = torch.tensor([4, 9])
    row = _row()
    if kind != "experts":  # keys of the tokens
        row["attention_mask"] = torch.cat((row["attention_mask"], row["attention_mask"][3:]))
    output = model(**row, read=places)
    assert len(output) == TOKENS
    assert torch.equal(read_hidden_states(model, output, places), output[places, 0])


def test_flops_are_counted_without_what_is_left_out() -> None:
    model = _model()
    sizes = {"model_type": "qwen3", "rope_theta": 1e4, **DENSE}
    flops = ForwardFlops.of(architecture_from_hf(sizes))
    read = torch.tensor([1, 4, 8, 19])
    counter = FlopCounterMode(display=False)
    row = _row()
    row["attention_mask"] = clean_layout([TOKENS], "full", 1)
    with counter, sdpa_kernel(SDPBackend.MATH):
        hidden = model(**row, read=read)
        forward = counter.get_total_flops()
        hidden.sum().backward()
    assert forward == flops.forward(TOKENS, TOKENS**2, 0, len(read))
    assert forward < flops.forward(TOKENS, TOKENS**2, 0)
    assert counter.get_total_flops() == (1 + BACKWARD) * forward
