"""Products by groups of rows against one dense product a row, in float64."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given

from megatron_dlm.models import grouped_linear as module
from megatron_dlm.models.grouped_linear import grouped_linear

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    dtype=st.sampled_from(list(TOLERANCES)),
    seed=st.integers(0, 2**16),
)
@example(sizes=[0, 0, 0], inputs=4, outputs=8, dtype=torch.float32, seed=0)  # no rows at all
@example(sizes=[0, 6, 0], inputs=3, outputs=5, dtype=torch.bfloat16, seed=1)  # one has them all
@example(sizes=[5], inputs=16, outputs=8, dtype=torch.float32, seed=2)  # one group
def test_equals_a_product_for_every_row(
    sizes: list[int], inputs: int, outputs: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rows = draw(sum(sizes), inputs).requires_grad_()
    weight = draw(len(sizes), outputs, inputs).requires_grad_()
    grad = draw(sum(sizes), outputs)
    ends = torch.tensor(sizes).cumsum(0).int()
    output = grouped_linear(rows, weight, ends)
    output.backward(grad)

    dense_rows = rows.detach().double().requires_grad_()
    dense_weight = weight.detach().double().requires_grad_()
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    expected = (dense_weight[group] @ dense_rows[:, :, None])[:, :, 0]
    expected.backward(grad.double())
    for found, reference in (
        (output, expected),
        (rows.grad, dense_rows.grad),
        (weight.grad, dense_weight.grad),
    ):
        assert found is not None
        assert found.dtype == dtype
        tolerance = TOLERANCES[dtype]
        scale = max(1.0, float(reference.detach().abs().max())) if reference.numel() else 1.0
        torch.testing.assert_close(
            found.double(), reference, rtol=0, atol=tolerance * scale, check_dtype=False
        )


def test_a_pytorch_without_the_kernel_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight = torch.randn(7, 8), torch.randn(3, 4, 8)
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)  # two rows belong to no group
    with_kernel = grouped_linear(rows, weight, ends)[:5]
    monkeypatch.setattr(module, "_has_kernel", lambda device_type, dtype: False)
    torch.testing.assert_close(grouped_linear(rows, weight, ends)[:5], with_kernel)
