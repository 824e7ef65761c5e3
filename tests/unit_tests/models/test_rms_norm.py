"""RMSNorm against PyTorch's own, and its gradients against those in float64."""

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis import given

from megatron_dlm.config import Config
from megatron_dlm.models.architecture import architecture_from_hf
from megatron_dlm.models.model_provider import transformer_config
from megatron_dlm.models.rms_norm import RMSNorm
from tests.tiny import DENSE


def _norm(size: int, weight: torch.Tensor) -> RMSNorm:
    architecture = architecture_from_hf({"model_type": "qwen3", "rope_theta": 1e4, **DENSE})
    norm = RMSNorm(
        transformer_config(architecture, Config.from_dict({"device": "cpu"})), size, 1e-6
    )
    norm.weight = torch.nn.Parameter(weight)
    return norm


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    size=st.integers(1, 33),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients(
    shape: list[int], size: int, dtype: torch.dtype, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, size, generator=generator).mul_(scale).to(dtype).requires_grad_()
    gradient = torch.randn(size, *shape, generator=generator).movedim(0, -1).to(dtype)
    norm = _norm(size, (1 + torch.randn(size, generator=generator)).to(dtype))
    wide = [t.detach().double().requires_grad_() for t in (x, norm.weight)]
    reference = F.rms_norm(wide[0], (size,), wide[1], 1e-6)
    expected = torch.autograd.grad(reference, wide, gradient.double())
    output = norm(x)
    assert output.dtype == dtype
    with torch.no_grad():  # PyTorch's kernel
        torch.testing.assert_close(output, norm(x))
    actual = torch.autograd.grad(output, (x, norm.weight), gradient)
    # What is added up, not its sum, which may be next to nothing.
    inverse = (wide[0].square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    terms = gradient.double().abs() * inverse
    magnitudes = (terms * wide[1].abs(), (terms * wide[0].abs()).flatten(0, -2).sum(0))
    rounding = 0.02 if dtype == torch.bfloat16 else 1e-5
    for found, of_reference, magnitude in zip(actual, expected, magnitudes, strict=True):
        assert found.dtype == dtype
        if found.numel():
            error = (found.double() - of_reference).abs().max()
            assert error <= rounding * magnitude.max()
