"""RMSNorm for Megatron's local layer specs: PyTorch's kernel, and fit for sequence parallelism."""

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor


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
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
