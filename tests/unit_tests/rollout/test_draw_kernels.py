"""Triton's kernels without a GPU, and what a draw reads and writes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_dlm.rollout import sampling
from megatron_dlm.rollout.block_draws import VOCABULARY_BLOCK
from megatron_dlm.rollout.sampling import sample_tokens
from tests.tiny import REPOSITORY

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux only")

N, COLUMNS, HIDDEN = 4, 151_936, 8
FILTERS = [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 50, 1.0), (1.0, 0, 0.95)]


@pytest.mark.slow
def test_kernels_draw_what_pytorch_draws() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit_tests.rollout.kernels_in_interpreter"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


POINTERS = {
    "logits": "*bf16",
    **dict.fromkeys(("masses", "fractions"), "*fp64"),
    **dict.fromkeys(("best", "prefix", "tokens"), "*i64"),
    "regular": "*i32",
    **dict.fromkeys(("blocks", "columns", "shift"), "i32"),
    "stride": "i64",
    "inverse_temperature": "fp32",
}


def kernels() -> Iterator[tuple[Any, dict[str, object], dict[str, str]]]:
    """Every kernel with its constants and the types of its arguments, if not float32 pointers."""
    from megatron_dlm.rollout import draw_kernels as module

    blocks = dict(BLOCK=VOCABULARY_BLOCK, GROUP=8)
    yield module.statistics_kernel, dict(**blocks, TEMPERED=True), {"mass": "*fp32"}
    yield module.filtered_kernel, blocks, {"masses": "*fp32"}
    digits = dict(KEY_BITS=16, DIGITS=256, STEP=32, STEPS=256, HAS_FLOOR=True)
    yield module.histogram_kernel, digits, {}
    draws = dict(BLOCK=VOCABULARY_BLOCK, BLOCKS=2048, DRAWS=True, HAS_THRESHOLD=True)
    yield module.choice_kernel, draws, {}


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.slow
def test_kernels_compile_ahead_of_time_without_spills(capability: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for kernel, constants, types in kernels():
        types = {**POINTERS, **types}
        signature = {
            name: "constexpr" if name in constants else types.get(name, "*fp32")
            for name in kernel.arg_names
        }
        positions = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        compiled = triton.compile(
            ASTSource(kernel, signature=signature, constexprs=positions),
            target=GPUTarget("cuda", capability, 32),
        )
        assert len(compiled.asm["cubin"]) > 1000
        spilled = compiled.asm["sass"].count("STL")  # stores to local memory
        assert spilled <= 16, (kernel.__name__, spilled)


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write, but for the head's product."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.widest_float32 = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        is_view = func.is_view or func.overloadpacket._qualified_op_name.endswith("detach")
        if not is_view:
            name = func.overloadpacket._qualified_op_name.split("::")[1]
            outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            self.widest_float32 = max(
                self.widest_float32, *(x.numel() for x in outputs if x.dtype == torch.float32), 0
            )
            if name not in ("mm", "mv", "empty", "new_empty", "device"):
                inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
                if name == "gather":  # of one input, only what it gives
                    inputs = [*inputs[1:], *outputs]
                if name == "choose_columns":  # of the logits, one block a row
                    self.bytes += len(inputs[0]) * VOCABULARY_BLOCK * inputs[0].element_size()
                    inputs = inputs[1:]
                self.bytes += sum(x.numel() * x.element_size() for x in (*inputs, *outputs))
        return result


def count(temperature: float, top_k: int, top_p: float, *, is_fake: bool) -> Traffic:
    """Of `N` draws; fake tensors have no values that the host could read."""
    with FakeTensorMode() if is_fake else nullcontext():
        hidden, weight = (torch.ones(rows, HIDDEN).bfloat16() for rows in (N, COLUMNS))
        uniforms = torch.zeros(N, dtype=torch.float64)
        with Traffic() as traffic:
            sample_tokens(
                hidden,
                weight,
                uniforms,
                vocab_start=0,
                vocab_size=COLUMNS - 200,
                mask_token_id=COLUMNS - 300,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
            )
    return traffic


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_kernels_move_at_most_six_times_the_bytes_of_the_logits_and_never_wait(
    filters: tuple[float, int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_dlm.rollout.draw_kernels import TRITON_PASSES

    monkeypatch.setattr(sampling, "_passes", lambda device: TRITON_PASSES)
    traffic = count(*filters, is_fake=True)
    assert 1 < traffic.bytes / (N * COLUMNS * 2) <= 6
    assert traffic.widest_float32 < N * COLUMNS / 8


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_logits_of_the_whole_vocabulary_are_never_written_in_float32(
    filters: tuple[float, int, float],
) -> None:
    traffic = count(*filters, is_fake=False)
    assert traffic.widest_float32 < N * COLUMNS / 2
