"""A linear layer for each group of rows, in one product: the experts of a mixture.

PyTorch's grouped product reads where groups end from a tensor on the device, so the host need not
know how many rows an expert has, and the number of kernels does not grow with that of experts. It
is there from PyTorch 2.8 on, and takes bf16, float16 and float32, on CUDA and (later) on a CPU.
Where it is absent or refuses a type, a loop over the groups does the same.

N: rows; E: groups; i, o: inputs and outputs of a layer.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_GROUPED_MM: Any = getattr(F, "grouped_mm", getattr(torch, "_grouped_mm", None))
_ALIGNMENT = 16
"""Rows of what the kernel multiplies start at multiples of so many bytes."""


def grouped_linear(inputs: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each group of rows by its own matrix; with gradients for inputs and weights.

    Args:
        inputs: [N, i], rows of a group together, groups in order.
        weight: [E, o, i], in the type of the inputs.
        ends: [E] int32 on the same device, the row that each group ends before. The last one is N
            where gradients are asked for; otherwise rows may follow that are in no group.

    Returns:
        [N, o]; rows in no group have any values.
    """
    multiple = _ALIGNMENT // weight.element_size()
    missing_outputs, missing_inputs = (-size % multiple for size in weight.shape[1:])
    if missing_outputs or missing_inputs:  # zeros change no sum
        inputs = F.pad(inputs, (0, missing_inputs))
        weight = F.pad(weight, (0, missing_inputs, 0, missing_outputs))
    output: Tensor = _GroupedLinear.apply(inputs.contiguous(), weight, ends)
    return output[:, :-missing_outputs] if missing_outputs else output


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight, ends)
        return _product(inputs, weight.transpose(1, 2), ends)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        inputs, weight, ends = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        needs_inputs, needs_weight, _ = ctx.needs_input_grad
        return (
            _product(grad_output, weight, ends) if needs_inputs else None,
            _product(grad_output.T, inputs, ends) if needs_weight else None,
            None,
        )


def _product(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """[N, a] by [E, a, b]: [N, b], by groups of rows. [a, N] by [N, b]: [E, a, b], over each."""
    if _has_kernel(left.device.type, left.dtype):
        product: Tensor = _GROUPED_MM(left, right, offs=ends)
        return product
    stops = ends.tolist()
    groups = list(zip([0, *stops[:-1]], stops, strict=True))
    if right.dim() == 2:
        return torch.stack([left[:, start:stop] @ right[start:stop] for start, stop in groups])
    output = left.new_zeros(len(left), right.shape[2])
    for (start, stop), matrix in zip(groups, right, strict=True):
        torch.mm(left[start:stop], matrix, out=output[start:stop])
    return output


@functools.cache
def _has_kernel(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this PyTorch multiplies groups of that type there."""
    if _GROUPED_MM is None:
        return False
    left = torch.ones(8, 8, device=device_type, dtype=dtype)
    try:
        _GROUPED_MM(left, left[None], offs=torch.tensor([8], dtype=torch.int32, device=device_type))
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return True
