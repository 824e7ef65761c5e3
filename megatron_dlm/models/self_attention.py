"""Megatron's self-attention with the sines and cosines of a row computed once, not in every layer.

On the CPU one kernel makes queries, keys and values of the first product.

S: tokens of the packed row; n: query heads, g: key/value heads of this tensor-parallel rank; d:
head size.
"""

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dlm.models import cpu_kernels
from megatron_dlm.models.rms_norm import RMSNorm


def rotation(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """What `rotate` needs of angles [S, d / 2]: cosines and signed sines, [2, S, 1, 1, d].

    Args:
        angles: Radians of each pair of channels, float32.
        dtype: Of the queries and keys.
    """
    cos, sin = angles.cos(), angles.sin()
    both = torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))
    return both[:, :, None, None].to(dtype)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) of queries or keys [S, 1, heads, d].

    Channel i turns with channel i + d / 2, as in transformers.
    """
    cos, signed_sin = rotation.unbind(0)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, first), dim=-1) * signed_sin


class RotatedSelfAttention(SelfAttention):
    """Self-attention whose `rotary_pos_emb` is a `rotation` instead of angles."""

    _rotation: Tensor

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> Any:
        """Attend; arguments as Megatron's."""
        self._rotation = rotary_pos_emb
        try:
            return super().forward(*args, rotary_pos_emb=None, **kwargs)
        finally:
            del self._rotation  # a row's own

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Queries [S, 1, n, d] and keys [S, 1, g, d], both rotated, and values [S, 1, g, d]."""
        norms = self.q_layernorm, self.k_layernorm
        normalises = bool(self.config.qk_layernorm)
        if (
            self._rotation.is_cpu
            and self._rotation.dtype in cpu_kernels.DTYPES
            and normalises == isinstance(norms[0], RMSNorm)
            # A hook expects a call of its module.
            and not any(norm and (norm._forward_hooks or norm._forward_pre_hooks) for norm in norms)
        ):
            kwargs["split_qkv"] = False
            mixed, _ = super().get_query_key_value_tensors(*args, **kwargs)
            weights = [norm.weight if normalises else None for norm in norms]
            arguments = mixed, self._rotation, *weights, self.config.layernorm_epsilon
            if torch.is_grad_enabled():
                return _RotatedHeads.apply(*arguments)
            return cpu_kernels.rotated_heads(*arguments)
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        return rotate(query, self._rotation), rotate(key, self._rotation), value


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        rotation: Tensor,
        query_weight: Tensor | None,
        key_weight: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(mixed, rotation, query_weight, key_weight)
        ctx.eps = eps
        return cpu_kernels.rotated_heads(mixed, rotation, query_weight, key_weight, eps)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_query: Tensor, of_key: Tensor, of_value: Tensor
    ) -> tuple[Tensor, None, Tensor | None, Tensor | None, None]:
        of_mixed, of_weights = cpu_kernels.rotated_heads_backward(
            of_query, of_key, of_value, *ctx.saved_tensors, ctx.eps
        )
        weights = (None, None) if ctx.saved_tensors[2] is None else of_weights.unbind(0)
        return of_mixed, None, *weights, None
