"""Megatron's self-attention with the sines and cosines of a row computed once, not in every layer.

S: tokens of the packed row; n: query heads, g: key/value heads of this tensor-parallel rank; d:
head size.
"""

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor


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
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        return rotate(query, self._rotation), rotate(key, self._rotation), value
