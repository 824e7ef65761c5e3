"""Kernels of layers on the CPU against formulas in float64; `RMSNorm` and SwiGLU have their own."""

import ctypes
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
from megatron_dlm.cpu_loops import library
from megatron_dlm.cpu_loops.library import loops_for
from megatron_dlm.errors import UserError
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


@pytest.mark.parametrize(
    "other",
    [torch.ones(4, dtype=torch.float64), torch.ones(4, 2)[:, 0], torch.ones(4, device="meta")],
)
def test_a_loop_takes_numbers_of_its_type_that_lie_together(other: Tensor) -> None:
    x, output = torch.ones(1, 4), torch.zeros(1, 4)
    with pytest.raises(ctypes.ArgumentError, match=r"not torch\.float32"):
        loops_for(torch.float32).rms_norm(x, other, 1, 4, 0.0, output)
    assert not output.any()


def test_code_is_kept_where_it_can_be_or_not_at_all(tmp_path: Path) -> None:
    places = [Path("/proc/none/a.o"), tmp_path / "new" / "b.o", tmp_path / "c.o"]
    library._keep(b"code", places)
    assert [file.read_bytes() for file in tmp_path.glob("**/*.*")] == [b"code"]
    library._keep(b"code", places[:1])


def test_code_that_is_damaged_or_of_other_sources_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops_for(torch.float32)
    kept = next(file for file in library._files(torch.float32) if file.is_file()).read_bytes()
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert library._read(torch.float32) is None
    beside, in_cache = library._files(torch.float32)
    for file in beside, in_cache:
        file.parent.mkdir(parents=True)
        file.write_bytes(kept)
    for damaged in (kept[:30_000], b"", kept[:-1] + b"x"):
        beside.write_bytes(damaged)
        assert library._read(torch.float32) is not None  # the other one's
    in_cache.write_bytes(kept[:30_000])
    assert library._read(torch.float32) is None
    key = library._key_now()
    assert key in beside.name
    monkeypatch.setenv("NUMBA_OPT", "0")
    assert library._key_now() != key


@pytest.mark.parametrize("switch", ["DISABLE_JIT", "BOUNDSCHECK"])
def test_switches_of_numba_that_loops_cannot_be_compiled_with(
    switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from numba import config  # which takes a second

    from megatron_dlm.cpu_loops.compiler import compiled

    monkeypatch.setattr(config, switch, 1)
    with pytest.raises(UserError, match=f"NUMBA_{switch} = 1: .*; unset it"):
        compiled("float32", library._processor())


def test_rotations_are_of_all_tokens() -> None:
    mixed, turn = torch.randn(5, 1, 2, 4 * 6), rotation(torch.rand(4, 3), torch.float32)
    with pytest.raises(ValueError, match="rotation"):
        cpu_kernels.rotated_heads(mixed, turn, None, None, EPS)


@pytest.mark.slow
def test_loops_are_compiled_once_and_loaded_without_numba(tmp_path: Path) -> None:
    script = (
        "import sys, torch; from megatron_dlm.models import cpu_kernels;"
        "print(cpu_kernels.rms_norm(torch.full((1, 4), 2.0), torch.ones(4), 0.0).tolist());"
        "print('numba' in sys.modules)"
    )

    def compiles(pycache: Path, caches: Path) -> bool:
        folders = {"PYTHONPYCACHEPREFIX": str(pycache), "XDG_CACHE_HOME": str(caches)}
        command = [sys.executable, "-c", script]
        environment = os.environ | folders
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        norm, has_numba = result.stdout.splitlines()
        assert norm == "[[1.0, 1.0, 1.0, 1.0]]"
        assert (has_numba == "True") == result.stderr.startswith("compiling loops")
        return has_numba == "True"

    nowhere = Path("/proc/none")
    assert compiles(nowhere, tmp_path)
    (kept,) = tmp_path.glob("megatron_dlm/float32.*.o")
    assert not compiles(nowhere, tmp_path)
    beside = tmp_path / "pycache" / Path(library.__file__).parent.relative_to("/")
    beside.mkdir(parents=True)
    kept.rename(beside / kept.name)
    assert not compiles(tmp_path / "pycache", nowhere)


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
