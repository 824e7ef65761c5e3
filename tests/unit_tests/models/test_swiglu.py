"""SwiGLU against its formula, and what a layer keeps for backward on a CPU."""

from collections import Counter

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from megatron_dlm.config import Config
from megatron_dlm.models import attention
from megatron_dlm.models.architecture import architecture_from_hf
from megatron_dlm.models.attention_layout import clean_layout
from megatron_dlm.models.forward import Row, forward_hidden, forward_row, padded_rows
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.models.swiglu import swiglu
from tests.tiny import DENSE, MOE

TOKENS = 40


@given(
    rows=st.integers(0, 7),
    inner=st.integers(1, 33),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_swiglu_is_its_formula(rows: int, inner: int, dtype: torch.dtype, seed: int) -> None:
    """Values and gradients, in float32 those of float64, else bit for bit PyTorch's own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 1, 2 * inner, generator=generator).mul_(4).to(dtype).requires_grad_()
    gradient = torch.randn(rows, 1, inner, generator=generator).to(dtype)
    own = dtype if dtype == torch.bfloat16 else torch.float64
    wide = x.detach().to(own).requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    (of_expected,) = torch.autograd.grad(expected, wide, gradient.to(own))
    actual = swiglu(x)
    (of_actual,) = torch.autograd.grad(actual, x, gradient)
    with torch.no_grad():
        assert torch.equal(swiglu(x), actual)
    for found, wanted in ((actual, expected), (of_actual, of_expected)):
        if own == dtype:
            assert torch.equal(found, wanted)
        else:
            torch.testing.assert_close(found, wanted.float(), rtol=1e-6, atol=2e-6)


def test_swiglu_of_large_numbers_and_of_none() -> None:
    """Of a gate far below zero nothing is left, and what is no number stays none."""
    gate = torch.tensor([-1e30, -200.0, -100.0, -88.0, 0.0, 88.0, 1e30, torch.inf, torch.nan])
    x = torch.cat((gate, torch.ones(9)))[None].requires_grad_()
    output = swiglu(x)
    torch.testing.assert_close(output[0, :7], F.silu(gate[:7]), rtol=1e-6, atol=1e-30)
    assert output[0, 7] == torch.inf
    assert output[0, 8].isnan()
    (gradient,) = torch.autograd.grad(output[0, :7].sum(), x)
    assert gradient[0, :7].isfinite().all()
    torch.testing.assert_close(gradient[0, 4:7], torch.tensor([0.5, 1.0, 1.0]))


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_what_is_kept_for_backward(kind: str) -> None:
    """One mask for all layers; of the feed-forward layer what goes into and out of its activation.

    A mask of numbers in each layer is S^2 of them a layer, more than all else at 4k tokens.
    """
    inner, layers = 24, 3
    if kind == "moe":
        sizes = {**MOE, "model_type": "qwen3_moe", "moe_intermediate_size": inner}
    else:
        sizes = {**DENSE, "model_type": "qwen3", "intermediate_size": inner}
    sizes |= {"num_hidden_layers": layers, "rope_theta": 1e4}
    architecture = architecture_from_hf(sizes, "config.json")
    model = build_model(architecture, Config.from_dict({"device": "cpu"})).train()
    tokens = torch.arange(TOKENS)
    rows, equally_long = padded_rows(
        model, [Row(tokens, tokens, clean_layout([TOKENS], "causal", 1))]
    )
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    forward_hidden(model, rows)
    assert not attention._biases_of_row._entries, "a mask is kept after the last layer"
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = forward_row(model, rows[0], equally_long)
    assert hidden.requires_grad
    masks = [tensor for tensor in kept.values() if tensor.shape[-2:] == (TOKENS, TOKENS)]
    assert len(masks) == 1
    activations = [tensor for tensor in kept.values() if tensor.grad_fn is not None]
    widths = Counter(tensor.shape[-1] for tensor in activations)
    assert widths[2 * inner] == layers
    # The router's weight of each expert's row is multiplied in afterwards.
    assert widths[inner] == (2 if kind == "moe" else 1) * layers
