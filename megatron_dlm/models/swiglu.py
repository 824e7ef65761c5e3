"""SwiGLU that keeps only its input for backward, as the fused kernel does that CUDA has."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dlm.models import cpu_kernels


def swiglu(gate_and_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2 f], gate first -> [..., f] (Shazeer 2020)."""
    if _has_kernel(gate_and_up) and not torch.is_grad_enabled():
        return cpu_kernels.swiglu(gate_and_up)
    output: Tensor = _SwiGLU.apply(gate_and_up)
    return output


class SwiGLU(MegatronModule):
    """`swiglu` as a part of Megatron's layer specs."""

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """Activate the output of a feed-forward layer's first product."""
        return swiglu(gate_and_up)


def _has_kernel(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.float32


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        if _has_kernel(gate_and_up):
            return cpu_kernels.swiglu(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        if _has_kernel(gate_and_up):
            return cpu_kernels.swiglu_backward(gradient, gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        of_gate, of_up = result.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return result
