"""RMSNorm for Megatron's local layer specs: one kernel, and fit for sequence parallelism."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dlm.models import cpu_kernels


class RMSNorm(torch.nn.Module):
    """Root-mean-square normalisation over the last dimension.

    Megatron-Core's own wrapper around `torch.nn.RMSNorm` refuses sequence parallelism; there, the
    gradient of a weight that saw only a part of the sequence has to be summed over the
    tensor-parallel group, which Megatron does for parameters that carry `sequence_parallel`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., hidden_size]."""
        if not x.is_cpu:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        if x.dtype in cpu_kernels.DTYPES:
            return _normalised(x, self.weight, self.eps)
        return _normalised(x.float(), self.weight.float(), self.eps).to(x.dtype)


def _normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not torch.is_grad_enabled():
        return cpu_kernels.rms_norm(x, weight, eps)
    output: Tensor = _RMSNorm.apply(x, weight, eps)
    return output


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return cpu_kernels.rms_norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return *cpu_kernels.rms_norm_backward(gradient, x, weight, ctx.eps), None
