"""Keys and values of running sequences, and attention against them.

The cache of a pipeline stage has one slot per running sequence. A forward pass carries consecutive
tokens of many slots, laid end to end; it overwrites the cache at their positions, then each token
attends to its slot. Writing first makes every kind of forward the same: prefilling a prompt,
denoising a block (whose noisy keys the next forward overwrites), and the clean block followed by
the next noisy one, where the block rule keeps either from seeing too much.

S: tokens of a forward; R: slots in use; n: query heads, g: key/value heads of this tensor-parallel
rank; d: head size; Q: most tokens of a slot in a group; K: longest sequence in a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dlm import platform


class KVCache:
    """Keys and values of the layers of this pipeline stage.

    Args:
        num_layers: Layers of this stage.
        first_layer_number: Megatron's number of the first of them.
        num_slots: Sequences held at once.
        max_length: Positions of a slot.
        num_attention_heads_per_partition: n.
        num_query_groups_per_partition: g.
        head_size: d.
        dtype: Floating type of keys and values.
        device: Where they live.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        first_layer_number: int,
        num_slots: int,
        max_length: int,
        num_attention_heads_per_partition: int,
        num_query_groups_per_partition: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.max_length = max_length
        self.heads_per_group = num_attention_heads_per_partition // num_query_groups_per_partition
        self.dtype = dtype
        self._first_layer_number = first_layer_number
        # Zeros, not uninitialised memory: a masked key has weight 0, and 0 * NaN would be NaN.
        self._storage = torch.zeros(
            2,
            num_layers,
            num_slots,
            max_length,
            num_query_groups_per_partition,
            head_size,
            dtype=dtype,
            device=device,
        )

    def layer(self, layer_number: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [slots, max_length, g, d], as views."""
        keys, values = self._storage[:, layer_number - self._first_layer_number]
        return keys, values

    def move(self, source: int, target: int) -> None:
        """Copy what slot `source` holds to slot `target`, in every layer."""
        self._storage[:, :, target] = self._storage[:, :, source]


@dataclass(frozen=True)
class _Group:
    """Slots that attend in one kernel call.

    Attributes:
        rows: [rows] int64 slots, or None for the slots 0 to num_rows - 1, whose cache needs no
            copy.
        gather: [rows * Q] int64, token of each query of the padded batch; None if that is the
            tokens in their order.
        bias: [rows, 1, n / g * Q, K], 0 where visible, -inf elsewhere. Every layer would make one
            of a boolean mask.
    """

    rows: Tensor | None
    num_rows: int
    num_queries: int
    num_keys: int
    gather: Tensor | None
    bias: Tensor

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, softmax_scale: float) -> Tensor:
        """[S, n, d] and a layer's cache -> context [rows * Q, n, d]."""
        num_heads, head_size = query.shape[1:]
        num_groups = keys.shape[2]
        if self.gather is not None:
            query = query.index_select(0, self.gather)
        # The query heads of one key/value head become further queries of it: no key is copied.
        query = query.view(self.num_rows, self.num_queries, num_groups, -1, head_size)
        query = query.permute(0, 2, 3, 1, 4).reshape(self.num_rows, num_groups, -1, head_size)

        def of_rows(cached: Tensor) -> Tensor:  # [slots, max_length, g, d] -> [rows, g, K, d]
            cached = cached[:, : self.num_keys]
            if self.rows is None:
                cached = cached[: self.num_rows]
            else:
                cached = cached.index_select(0, self.rows)
            return cached.transpose(1, 2)

        context = F.scaled_dot_product_attention(
            query, of_rows(keys), of_rows(values), attn_mask=self.bias, scale=softmax_scale
        )
        context = context.view(self.num_rows, num_groups, -1, self.num_queries, head_size)
        return context.permute(0, 3, 1, 2, 4).reshape(-1, num_heads, head_size)


@dataclass(frozen=True)
class _PlannedGroup:
    """What a `_Group` is made of, on the host.

    Attributes:
        all_slots: Whether it holds the slots 0, 1, ...
        in_order: Whether its padded batch of queries is the tokens in their order.
        num_keys: K.
        rows: [rows] int64.
        gather: [rows, Q] int64.
        limit: [rows, Q] int64, end of the keys that each query sees.
    """

    all_slots: bool
    in_order: bool
    num_keys: int
    rows: Tensor
    gather: Tensor
    limit: Tensor


def _attention_bias(limit: Tensor, num_keys: int, dtype: torch.dtype) -> Tensor:
    """[rows, 1, queries, K] from the ends of the visible keys [rows, queries]."""
    hidden = torch.arange(num_keys, device=limit.device) >= limit[:, :, None]
    bias = torch.zeros(hidden.shape, dtype=dtype, device=limit.device)
    return bias.masked_fill_(hidden, -torch.inf)[:, None]


class CacheView:
    """A `KVCache` for one forward pass, handed to the layers as Megatron's `attention_mask`.

    Implements `megatron_dlm.models.attention.CachedAttention`. Slot r contributes the tokens at
    positions starts[r] to ends[r] - 1, slots in ascending order. A query at position i sees the
    keys of its slot at positions below min((i // block_size + 1) * block_size, ends[r]).

    Args:
        cache: The cache; every position below starts[r] must have been written before.
        starts: [R] int64 on the CPU.
        ends: [R] int64 on the CPU.
        block_size: Grid of the block-causal visibility, anchored at position 0; 1 is causal.
    """

    def __init__(self, cache: KVCache, starts: Tensor, ends: Tensor, block_size: int) -> None:
        self._cache = cache
        lengths = ends - starts
        offsets = lengths.cumsum(0) - lengths
        self.num_tokens = int(lengths.sum())
        self._groups: list[_Group] = []
        if self.num_tokens == 0:
            return
        if int(ends.max()) > cache.max_length:
            raise ValueError(
                f"position {int(ends.max()) - 1} is beyond {cache.max_length} positions"
            )
        slots = torch.repeat_interleave(torch.arange(len(starts)), lengths)
        within = torch.arange(self.num_tokens) - offsets[slots]
        write = slots * cache.max_length + starts[slots] + within
        # Denoising slots have one or two blocks of queries and share a kernel call. Prompts go by
        # powers of two of their length, so that a short one is never padded to a long one.
        bucket = (lengths.clamp(min=1) / (2 * block_size)).log2().ceil().clamp_(min=0)
        scatter = torch.empty_like(slots)
        planned: list[_PlannedGroup] = []
        done = 0
        for value in bucket[lengths > 0].unique().tolist():
            chosen = (bucket == value) & (lengths > 0)
            # Computing a few unneeded slots costs less than copying the keys of the others.
            all_slots = value == 0 or bool(chosen.all())
            rows = torch.arange(len(starts)) if all_slots else chosen.nonzero()[:, 0]
            num_queries = int(lengths[chosen].max())
            query = torch.arange(num_queries)
            limit = ((starts[rows, None] + query) // block_size + 1) * block_size
            planned.append(
                _PlannedGroup(
                    all_slots=all_slots,
                    in_order=bool((lengths == num_queries).all()),
                    num_keys=int(ends[chosen].max()),
                    rows=rows,
                    # Padded queries repeat some token; their results are never read.
                    gather=(offsets[rows, None] + query).clamp_(max=self.num_tokens - 1),
                    # Each of their positions sees some key, so no softmax is empty.
                    limit=torch.minimum(limit, ends[rows, None]).clamp_(min=1),
                )
            )
            row_of_slot = torch.zeros_like(starts)
            row_of_slot[rows] = torch.arange(len(rows))
            tokens = chosen[slots]
            scatter[tokens] = (done + row_of_slot[slots] * num_queries + within)[tokens]
            done += len(rows) * num_queries
        on_host = [write, scatter]
        for group in planned:
            on_host += [group.rows, group.gather, group.limit]
        self._write, device_scatter, *parts = platform.to_device(*on_host)
        for index, group in enumerate(planned):
            rows, gather, limit = parts[3 * index : 3 * index + 3]
            self._groups.append(
                _Group(
                    rows=None if group.all_slots else rows,
                    num_rows=len(rows),
                    num_queries=limit.shape[1],
                    num_keys=group.num_keys,
                    gather=None if group.in_order else gather.flatten(),
                    bias=_attention_bias(
                        limit.repeat(1, cache.heads_per_group), group.num_keys, cache.dtype
                    ),
                )
            )
        in_order = len(self._groups) == 1 and self._groups[0].gather is None
        self._scatter = None if in_order else device_scatter

    def attend(
        self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, softmax_scale: float
    ) -> Tensor:
        """Write keys and values of the forward's tokens, then attend.

        Args:
            layer_number: Megatron's, from 1.
            query: [S + padding, 1, n, d], rotary embedding applied.
            key: [S + padding, 1, g, d], likewise.
            value: [S + padding, 1, g, d].
            softmax_scale: Factor on the scores.

        Returns:
            Context [S + padding, 1, n, d]; zero for padding tokens, which are also not cached.
        """
        if self.num_tokens == 0:
            return torch.zeros_like(query)
        keys, values = self._cache.layer(layer_number)
        keys.flatten(0, 1)[self._write] = key[: self.num_tokens, 0]
        values.flatten(0, 1)[self._write] = value[: self.num_tokens, 0]
        real = query[: self.num_tokens, 0]
        contexts = [group.attend(real, keys, values, softmax_scale) for group in self._groups]
        context = contexts[0] if len(contexts) == 1 else torch.cat(contexts)
        if self._scatter is not None:
            context = context.index_select(0, self._scatter)
        if len(query) > self.num_tokens:
            context = F.pad(context, (0, 0, 0, 0, 0, len(query) - self.num_tokens))
        return context[:, None]
