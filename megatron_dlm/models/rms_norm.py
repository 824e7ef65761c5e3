"""RMSNorm for Megatron's local layer specs: PyTorch's kernel, and fit for sequence parallelism."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable


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
        if x.is_cpu and torch.is_grad_enabled():
            output: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
            return output
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """Of x [..., h], in half the time on a CPU, for which PyTorch has no kernel of both passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = x.shape[-1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(size)
        inverse = mean_square.add_(eps).rsqrt_()
        normalised = wide * inverse
        ctx.save_for_backward(normalised, inverse, weight)
        return (normalised * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        normalised, inverse, weight = ctx.saved_tensors
        size = normalised.shape[-1]
        products = (gradient * normalised).reshape(-1, size)
        along = torch.mv(products, weight.to(products.dtype)).view(inverse.shape)
        of_x = (gradient * weight).to(normalised.dtype)
        of_x = of_x.addcmul_(normalised, along, value=-1 / size).mul_(inverse)
        return of_x.to(gradient.dtype), products.sum(0).to(weight.dtype), None
