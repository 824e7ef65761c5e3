"""Attention of rows of queries to the pages of their sequences: one call of a kernel.

n: query heads, g: key/value heads of this tensor-parallel rank; d: head size; S: tokens of a
forward; Q: queries of a row; K: keys of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from megatron_dlm.models.attention import flex_attention_over_pages
from megatron_dlm.rollout.pages import PAGE_SIZE


@dataclass(frozen=True)
class Tiles:
    """Rows of one kernel call, each some consecutive tokens of a slot; padding rows come last.

    Attributes:
        queries: [rows, Q] int64, token of each query. Those after the last one of a slot repeat it,
            those of padding rows are token 0; their results are never read.
        pages: [rows, K / PAGE_SIZE, rounded up] int64.
        mask: [rows, 1, n / g * Q, K], added to the scores: 0 where visible, else -inf; for
            FlexAttention, K are all positions of the cache.
        in_order: Whether the queries are all tokens of the forward in their order.
    """

    queries: Tensor
    pages: Tensor
    mask: Tensor | BlockMask
    in_order: bool = False

    def _keys_and_values(self, cached: Tensor, num_keys: int) -> Tensor:
        """Of each row, [2, rows, g, K, d], from a layer's cache."""
        num_groups, head_size = cached.shape[2:]
        both = cached.view(2, -1, PAGE_SIZE * num_groups * head_size)
        both = both.index_select(1, self.pages.flatten())
        both = both.view(2, len(self.pages), -1, num_groups, head_size)
        return both[:, :, :num_keys].transpose(2, 3)

    def attend(
        self, query: Tensor, cached: Tensor, softmax_scale: float, *, with_sums: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """[S, ..., n, d] and a layer's cache -> context [rows * Q, ..., n, d].

        With sums also the log-sum-exp of the scores, [rows * Q, ..., n], minus infinity where a
        query sees nothing.
        """
        of_token = query.shape[1:]
        num_groups, head_size = cached.shape[2:]
        rows, num_queries = self.queries.shape
        if not self.in_order:
            query = query.index_select(0, self.queries.flatten())
        # The query heads of one key/value head become further queries of it: no key is copied.
        query = query.view(rows, num_queries, num_groups, -1, head_size)
        query = query.permute(0, 2, 3, 1, 4).reshape(rows, num_groups, -1, head_size)
        if isinstance(self.mask, BlockMask):
            keys, values = cached.transpose(1, 2)[:, None].unbind(0)  # [1, g, K, d]
            context, sums = flex_attention_over_pages(
                query, keys, values, self.mask, softmax_scale, with_sums=with_sums
            )
        else:
            keys, values = self._keys_and_values(cached, self.mask.shape[-1]).unbind(0)
            attention = attention_with_sums if with_sums else _attention
            context, sums = attention(query, keys, values, self.mask, softmax_scale)

        context = context.view(rows, num_groups, -1, num_queries, head_size)
        context = context.permute(0, 3, 1, 2, 4).reshape(-1, *of_token)
        if sums is not None:
            sums = sums.view(rows, num_groups, -1, num_queries)
            sums = sums.permute(0, 3, 1, 2).reshape(-1, *of_token[:-1])
        return context, sums


def _attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, softmax_scale: float
) -> tuple[Tensor, None]:
    context = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=softmax_scale
    )
    return context, None


def attention_with_sums(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of its scores, which PyTorch's does not return.

    Args:
        query: [rows, g, Q, d].
        keys: [rows, g, K, d].
        values: [rows, g, K, d].
        mask: Added to the scores, [rows, 1, Q, K].
        softmax_scale: Factor on the scores.

    Returns:
        Context [rows, g, Q, d], zero where a query sees nothing; float32 or wider [rows, g, Q],
        there minus infinity.
    """
    scores = (query @ keys.transpose(2, 3) * softmax_scale + mask).to(
        torch.promote_types(query.dtype, torch.float32)
    )
    sums = scores.logsumexp(dim=-1)
    weights = (scores - sums.nan_to_num(neginf=0.0)[..., None]).exp()
    return weights.to(values.dtype) @ values, sums
