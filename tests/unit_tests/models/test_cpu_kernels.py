"""Kernels of layers on the CPU against formulas in float64; `RMSNorm` and SwiGLU have their own."""

import os
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_dlm.config import Config
from megatron_dlm.models import cpu_kernels
from megatron_dlm.models.architecture import architecture_from_hf
from megatron_dlm.models.attention_layout import clean_layout
from megatron_dlm.models.forward import Row, forward_hidden
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.models.self_attention import _RotatedHeads, rotation
from tests.tiny import DENSE

EPS = 1e-6


def heads_by_formula(
    mixed: Tensor, angles: Tensor, weights: tuple[Tensor, Tensor] | None, size: int
) -> list[Tensor]:
    """Queries, keys and values of mixed [S, 1, g, H d], as complex numbers turn."""
    tokens, _, groups, width = mixed.shape
    shared = width // size - 2
    parts = list(mixed.view(tokens, groups, shared + 2, size).split([shared, 1, 1], 2))
    for part in range(2):
        x = parts[part]
        if weights is not None:
            x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weights[part]
        pairs = torch.complex(*x.chunk(2, dim=-1))
        turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None, None]
        parts[part] = torch.cat((turned.real, turned.imag), dim=-1)
    return [part.reshape(tokens, 1, part.shape[1] * part.shape[2], size) for part in parts]


@given(
    tokens=st.integers(0, 5) | st.just(300),
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    half=st.sampled_from([1, 3, 8]),
    normalises=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_rotated_heads(
    tokens: int,
    groups: int,
    shared: int,
    half: int,
    normalises: bool,
    dtype: torch.dtype,
    strided: bool,
    seed: int,
) -> None:
    """Values and gradients; from 128 tokens on, gradients of weights are sums of sums."""
    generator = torch.Generator().manual_seed(seed)
    size = 2 * half

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    mixed = random(tokens, 1, groups, (shared + 2) * size)
    if strided:
        mixed = mixed.transpose(0, 3).contiguous().transpose(0, 3)
    mixed.requires_grad_()
    angles = 6 * torch.rand(tokens, half, generator=generator)
    weights = None
    if normalises:
        weights = (1 + 0.1 * random(size)).requires_grad_(), random(size).requires_grad_()
    inputs = [mixed, *(weights or ())]
    turn = rotation(angles.to(dtype), dtype)
    found = _RotatedHeads.apply(mixed, turn, *(weights or (None, None)), EPS)
    gradients = [random(*part.shape) for part in found]
    if strided:
        gradients = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in gradients]
    of_inputs = torch.autograd.grad(found, inputs, gradients)

    wide = [x.detach().double().contiguous().requires_grad_() for x in inputs]
    expected = heads_by_formula(
        wide[0], angles.to(dtype).double(), (wide[1], wide[2]) if normalises else None, size
    )
    of_wide = torch.autograd.grad(expected, wide, [x.double() for x in gradients])
    rounding = 1e-5 if dtype == torch.float32 else 1e-13
    for actual, reference in zip(found, expected, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), reference, rtol=rounding, atol=10 * rounding)
    for actual, reference in zip(of_inputs, of_wide, strict=True):
        most = reference.abs().max().item() if reference.numel() else 0.0
        torch.testing.assert_close(
            actual.double(), reference, rtol=10 * rounding, atol=20 * rounding * max(most, 1.0)
        )
    with torch.no_grad():
        again = cpu_kernels.rotated_heads(mixed, turn, *(weights or (None, None)), EPS)
    assert all(torch.equal(*pair) for pair in zip(again, found, strict=True))


def test_what_tracers_are_told_is_what_kernels_return() -> None:
    mixed, turn = torch.randn(5, 1, 2, 4 * 6), rotation(torch.rand(5, 3), torch.float32)
    weight, x, gate_and_up = torch.ones(6), torch.randn(5, 1, 6), torch.randn(5, 1, 8)
    heads = cpu_kernels.rotated_heads(mixed, turn, weight, weight, EPS)
    calls = {
        cpu_kernels.rms_norm: (x, weight, EPS),
        cpu_kernels.rms_norm_backward: (x, x, weight, EPS),
        cpu_kernels.rotated_heads: (mixed, turn, weight, weight, EPS),
        cpu_kernels.rotated_heads_backward: (*heads, mixed, turn, weight, weight, EPS),
        cpu_kernels.swiglu: (gate_and_up,),
        cpu_kernels.swiglu_backward: (gate_and_up[..., :4], gate_and_up),
    }
    assert calls.keys() == cpu_kernels.IMPLEMENTATIONS.keys()
    for operation, arguments in calls.items():
        results = operation(*arguments)
        with FakeTensorMode() as mode:
            fake = operation(
                *(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments)
            )
        results, fake = (r if isinstance(r, tuple) else (r,) for r in (results, fake))
        for real, told in zip(results, fake, strict=True):
            assert (told.shape, told.dtype, told.stride()) == (
                real.shape,
                real.dtype,
                real.stride(),
            )


def test_memory_of_an_array_stays_while_it_is_used_and_can_be_given_back() -> None:
    x = torch.arange(6.0).view(2, 3)
    array = cpu_kernels.array_of(x.T)  # of a copy that nothing else refers to
    torch.full((1000, 6), 7.0)  # would lie in its place
    assert array.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    own = cpu_kernels.array_of(x.requires_grad_())
    own[0, 0] = 9.0
    assert x[0, 0] == 9.0
    x.untyped_storage().resize_(0)  # as offloading does
    assert cpu_kernels.array_of(torch.empty(0, 4)).shape == (0, 4)


def _norm_elsewhere(**environment: str) -> None:
    """Call a kernel in a process of its own."""
    script = (
        "import torch; from megatron_dlm.models import cpu_kernels;"
        "print(cpu_kernels.rms_norm(torch.full((1, 4), 2.0), torch.ones(4), 0.0).tolist())"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True
    )
    assert result.stdout == "[[1.0, 1.0, 1.0, 1.0]]\n", result.stderr


@pytest.mark.slow
def test_loops_are_kept_under_names_of_their_own_or_not_at_all(tmp_path: Path) -> None:
    """Of two processes that compile at once, none reads what the other one's index names."""
    for processes in (1, 2):
        _norm_elsewhere(NUMBA_CACHE_DIR=str(tmp_path))
        kept = list(tmp_path.glob("**/*rms_norm-*.nbc"))
        assert len(kept) == processes
        for index in tmp_path.glob("**/*rms_norm-*.nbi"):  # as if the other one had not written it
            index.unlink()
    _norm_elsewhere(
        NUMBA_CACHE_DIR="/proc/none", NUMBA_CACHE_LOCATOR_CLASSES="_UserProvidedCacheLocator"
    )


@pytest.mark.usefixtures("single_process")
def test_norms_with_hooks_are_called() -> None:
    sizes = {**DENSE, "model_type": "qwen3", "rope_theta": 1e4}
    architecture = architecture_from_hf(sizes, "config.json")
    model = build_model(architecture, Config.from_dict({"device": "cpu"})).eval()
    tokens = torch.arange(8)
    row = Row(tokens, tokens, clean_layout([8], "causal", 1))
    (expected,) = forward_hidden(model, [row]) or []
    calls = []
    norm = model.decoder.layers[0].self_attention.k_layernorm
    norm.register_forward_hook(lambda module, args, output: calls.append(output.shape))
    (found,) = forward_hidden(model, [row]) or []
    assert len(calls) == 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
