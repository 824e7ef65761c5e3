"""The router of a mixture of experts where Transformer Engine is not installed."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

_ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class TorchTopKRouter(TopKRouter):
    """Megatron's router with its gate computed by PyTorch.

    The gate that it replaces asks for a kernel of Transformer Engine by a name that is defined only
    where that is installed.
    """

    def gating(self, input: Tensor) -> Tensor:
        """Router logits [..., experts] of hidden states [..., h], in `moe_router_dtype`."""
        dtype = _ROUTER_DTYPES.get(self.config.moe_router_dtype, input.dtype)
        return F.linear(input.to(dtype), self.weight.to(dtype))
