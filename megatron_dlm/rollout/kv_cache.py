"""Keys and values of running sequences in pages, and attention against them.

The cache of a pipeline stage is a pool of pages (`megatron_dlm.rollout.pages`); the page table of a
sequence names those that hold its positions, in order. A forward pass carries consecutive tokens of
many sequences, laid end to end; it overwrites the cache at their positions, then each token attends
to its sequence. Writing first makes every kind of forward the same: prefilling a prompt, denoising
a block (whose noisy keys the next forward overwrites), and the clean block followed by the next
noisy one, where the block rule keeps either from seeing too much. Where ranks share sequences, each
has the queries, keys and values of all tokens of a forward in `CacheView.attend`, but writes and
reads its own pages only (`megatron_dlm.rollout.token_shares`).

A row of a call is one or two blocks of a sequence, or a tile of `PREFILL_TILE` tokens of a prompt.
On the CPU a loop (`megatron_dlm.cpu_loops`) has the former, sequence by sequence, where keys are.
Kernels of a GPU are planned once for each shape, so they see few different ones: a row has always
two blocks, the number of rows is rounded up to a power of 2 (of 4 for tiles), 4 at least, with rows
that belong to nobody, and the pages of the longest to a power of 2. On the CPU, where padding costs
time and shapes do not, shapes are those of the sequences.

S: tokens of a forward; R: slots in use; n: query heads, g: key/value heads of this tensor-parallel
rank; d: head size; Q: queries of a row; K: keys of a row.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from megatron_dlm import platform
from megatron_dlm.cpu_loops.library import loops_for
from megatron_dlm.models import cpu_kernels
from megatron_dlm.models.attention import FLEX_TILE
from megatron_dlm.rollout.pages import NULL_PAGE, PAGE_SIZE, padded, pages_for
from megatron_dlm.rollout.tiles import Tiles
from megatron_dlm.rollout.token_shares import TokenShares

# Queries of a row in prefill. A tile reads the keys of its sequence once.
PREFILL_TILE = 64

# Queries of a sequence that a loop on the CPU has at once: its keys are read once for all of them.
_TOKENS_OF_TILE = 16

# Pages of a row of static shape: a size of one would be another kind for the compiler.
LEAST_PAGES = 2


def _bucket(count: int, base: int, least: int = 1) -> int:
    """The smallest product of `least` and a power of `base` that is at least `count`."""
    bucket = least
    while bucket < count:
        bucket *= base
    return bucket


def has_static_shapes(device: torch.device) -> bool:
    """Whether kernels see few shapes, padded, or those of the sequences."""
    return device.type != "cpu"


class KVCache:
    """Keys and values of the layers of this pipeline stage.

    Args:
        layer_numbers: Megatron's numbers of the layers of this stage.
        num_pages: Pages for sequences; page 0 comes in addition.
        num_attention_heads_per_partition: n.
        num_query_groups_per_partition: g.
        head_size: d.
        dtype: Floating type of keys and values.
        device: Where they live.
        backend: "flex" reads pages where they are (FlexAttention, CUDA); "sdpa" copies them into a
            row first, but for what the CPU's loop has.
        shares: What this rank keeps of sequences that ranks share; None: all of its own ones.
    """

    def __init__(
        self,
        *,
        layer_numbers: Sequence[int],
        num_pages: int,
        num_attention_heads_per_partition: int,
        num_query_groups_per_partition: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
        backend: str,
        shares: TokenShares | None = None,
    ) -> None:
        self.shares = shares
        self.page_size = PAGE_SIZE if shares is None else shares.page_size
        self.heads_per_group = num_attention_heads_per_partition // num_query_groups_per_partition
        self.dtype, self.device, self.backend = dtype, device, backend
        self.num_pages = num_pages
        shape = (2, (num_pages + 1) * PAGE_SIZE, num_query_groups_per_partition, head_size)
        # A tensor for each layer: compiled kernels are made for the offset of a view. Zeros, not
        # uninitialised memory: a masked key has weight 0, and 0 * NaN would be NaN.
        self._layers = {
            number: torch.zeros(shape, dtype=dtype, device=device) for number in layer_numbers
        }

    def layer(self, layer_number: int) -> Tensor:
        """Keys and values of one layer, [2, pages * PAGE_SIZE, g, d]."""
        return self._layers[layer_number]

    @property
    def layers(self) -> tuple[Tensor, ...]:
        """Those of all layers, in their order."""
        return tuple(self._layers.values())

    @property
    def has_loop(self) -> bool:
        """Whether steps without prefill are a loop on the CPU."""
        no_others = self.backend == "sdpa" and self.shares is None
        on_cpu = self.device.type == "cpu" and not has_static_shapes(self.device)
        return on_cpu and no_others and self.dtype in cpu_kernels.DTYPES

    def over(self, layers: Sequence[Tensor]) -> KVCache:
        """The same cache in other tensors, in the order of `layers`."""
        other = copy.copy(self)
        other._layers = dict(zip(self._layers, layers, strict=True))
        return other


class _Call(NamedTuple):
    """What a kernel call is made from.

    Attributes:
        queries: See `Tiles`.
        pages: Likewise.
        visible: For FlexAttention, one past the last position that each query sees,
            [rows, n / g * Q]; else the mask, [rows, n / g * Q, K].
    """

    queries: Tensor
    pages: Tensor
    visible: Tensor


class _Blocks(NamedTuple):
    """Sequences with one or two blocks in a forward, for `paged_attention`.

    Attributes:
        write: [S] int64, where the keys of all tokens of the forward are stored.
        tables: [R, pages] int64, of these sequences.
        firsts: [R] int64, first token of each.
        ends: [R] int64, one past the last.
        reach: [S] int64, one past the last position that a token sees.
        where: [greatest reach + 3] int64, scratch: positions in the cache, of one tile.
    """

    write: Tensor
    tables: Tensor
    firsts: Tensor
    ends: Tensor
    reach: Tensor
    where: Tensor

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cached: Tensor, softmax_scale: float
    ) -> Tensor:
        """Store all tokens' keys and values; context [S, 1, n, d], zero for other sequences."""
        context = torch.zeros(query.shape, dtype=query.dtype)
        tokens, _, groups, size = key.shape
        shared = query.shape[2] // groups
        loops_for(query.dtype).paged_attention(
            *(x.contiguous() for x in (query, key, value)),
            tokens,
            groups,
            shared,
            size,
            cached,
            cached.shape[1],
            PAGE_SIZE,
            self.write,
            self.tables,
            self.firsts,
            self.ends,
            *self.tables.shape,
            self.reach,
            softmax_scale,
            self.where,
            query.new_empty(_TOKENS_OF_TILE * shared, len(self.where)),
            len(self.where),
            _TOKENS_OF_TILE,
            context,
        )
        return context


class CacheView:
    """A `KVCache` for one forward pass, handed to the layers as Megatron's `attention_mask`.

    Implements `megatron_dlm.models.attention.CachedAttention`. Slot r contributes the tokens at
    positions starts[r] to ends[r] - 1, slots in ascending order. Those from noisy_starts[r] on see
    all keys of their slot below ends[r]; an earlier one, at position i, those at positions below
    (i // c + 1) * c with c = context_block_size.

    Args:
        cache: The cache; every position below starts[r] must have been written before.
        tables: [R, pages of the longest sequence] int64, the page table of each slot.
        starts: [R] int64, multiples of the context's block size.
        ends: [R] int64, of the block size.
        block_size: Tokens of a block in decoding.
        context_block_size: Grid of the context's visibility, anchored at position 0; 1 is causal.
            None: `block_size`.
        noisy_starts: [R] int64, first position of the block in decoding; None: there is none.

    Attributes:
        num_tokens: Tokens of the forward.
        prefills: Whether some of them are tiles of a prompt.
    """

    def __init__(
        self,
        cache: KVCache,
        tables: np.ndarray,
        starts: np.ndarray,
        ends: np.ndarray,
        block_size: int,
        *,
        context_block_size: int | None = None,
        noisy_starts: np.ndarray | None = None,
    ) -> None:
        self._cache = cache
        shares, page_size = cache.shares, cache.page_size
        lengths = ends - starts
        grid = context_block_size or block_size
        noisy_starts = ends if noisy_starts is None else noisy_starts
        self.num_tokens = int(lengths.sum())
        self.prefills = False
        self._calls: list[_Call] = []
        self._blocks: _Blocks | None = None
        self._tiles: list[Tiles] | None = None
        if self.num_tokens == 0:
            return
        if int(ends.max()) > tables.shape[1] * page_size:
            raise ValueError(f"position {int(ends.max()) - 1} is beyond the page tables")
        offsets = lengths.cumsum() - lengths
        slots = np.arange(len(starts)).repeat(lengths)
        tokens = np.arange(self.num_tokens)
        positions = tokens + (starts - offsets)[slots]
        write = tables[slots, positions // page_size] * PAGE_SIZE + positions % PAGE_SIZE
        written: tuple[np.ndarray, ...] = ()
        if shares is not None:
            written = shares.keeps(positions).nonzero()
            write = write[written]

        # Denoising slots have one or two blocks; prompts go by tiles, which read fewer keys.
        prefills = lengths > 2 * block_size
        denoises = ~prefills & (lengths > 0)
        static = has_static_shapes(cache.device)
        num_keys = []
        arrays = []
        first_query = np.zeros_like(starts)  # of each slot, among the queries of all calls
        done = 0
        for chosen, most_queries, base in (
            (denoises, 2 * block_size, 2),
            (prefills, PREFILL_TILE, 4),
        ):
            own = chosen.nonzero()[0]
            if not len(own):
                continue
            if chosen is denoises and cache.has_loop:
                noisy = positions >= noisy_starts[slots]
                reach = np.where(noisy, ends[slots], (positions // grid + 1) * grid)
                where = np.empty(int(reach.max()) + 3, np.int64)
                own_ends = offsets[own] + lengths[own]
                arrays_of = write, tables[own], offsets[own], own_ends, reach, where
                self._blocks = _Blocks(*map(torch.from_numpy, arrays_of))
                first_query[own] = offsets[own]
                done = self.num_tokens
                continue
            self.prefills |= chosen is prefills
            num_queries = most_queries if static else min(most_queries, int(lengths[own].max()))
            num_tiles = -(-lengths[own] // num_queries)
            before = num_tiles.cumsum() - num_tiles
            first_query[own] = done + before * num_queries
            slot = own.repeat(num_tiles)
            tile = np.arange(len(slot)) - before.repeat(num_tiles)
            query = tile[:, None] * num_queries + np.arange(num_queries)
            query = np.minimum(query, lengths[slot, None] - 1)
            at = starts[slot, None] + query
            is_noisy = at >= noisy_starts[slot, None]
            reach = np.where(is_noisy, ends[slot, None], (at // grid + 1) * grid)
            if shares is not None:
                reach = shares.kept_below(reach)
            num_keys.append(max(int(reach.max()), 1))
            num_pages, num_rows = pages_for(num_keys[-1]), len(slot)
            if static:
                num_pages = max(min(_bucket(num_pages, 2), tables.shape[1]), LEAST_PAGES)
                num_rows = _bucket(num_rows, base, least=4)
                num_keys[-1] = num_pages * PAGE_SIZE
            arrays += [
                padded(offsets[slot, None] + query, num_rows, num_queries, 0),
                padded(tables[slot, :num_pages], num_rows, num_pages, NULL_PAGE),
                padded(reach, num_rows, num_queries, 1),  # a position of the null page
            ]
            done += num_rows * num_queries
        scatter = tokens + (first_query - offsets)[slots]
        # Rows of the same length without padding, or none of a call.
        self._in_order = done == self.num_tokens and len(num_keys) <= 1 and not (static or shares)
        self._write, self._scatter, *uploaded = platform.to_device(
            *map(torch.from_numpy, (write, scatter, *arrays, *written))
        )
        if shares is not None:
            self._written = uploaded.pop()
        for queries, read, limits, keys in zip(
            uploaded[::3], uploaded[1::3], uploaded[2::3], num_keys, strict=True
        ):
            visible = limits if cache.backend == "flex" else self._mask(limits, keys)
            visible = torch.cat([visible] * cache.heads_per_group, dim=1)
            self._calls.append(_Call(queries, read, visible))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that a forward reads of this, but for its tokens; what it writes is among them."""
        calls = [tensor for call in self._calls for tensor in call]
        return (self._write, self._scatter, *calls, *self._cache.layers)

    @property
    def num_rows(self) -> int:
        """Rows of all kernel calls, padding included."""
        return sum(len(call.queries) for call in self._calls)

    @property
    def num_layers(self) -> int:
        """So many of `tensors` are layers of the cache: the last ones."""
        return len(self._cache.layers)

    def over(self, tensors: Sequence[Tensor]) -> CacheView:
        """The same kind of forward on other tensors.

        Args:
            tensors: In the order of `tensors`. Sizes may be others, as far as they fit each other;
                a forward has as many tokens as the first one has elements.
        """
        other = copy.copy(self)
        other._write, other._scatter, *rest = tensors
        other.num_tokens = other._write.shape[0]
        size = 3 * len(self._calls)
        other._calls = [_Call(*rest[at : at + 3]) for at in range(0, size, 3)]
        other._cache = self._cache.over(rest[size:])
        other._tiles = None
        return other

    def _tiles_of(self, call: _Call) -> Tiles:
        queries, pages, visible = call
        is_flex = self._cache.backend == "flex"
        mask = self._block_mask(pages, visible) if is_flex else visible[:, None]
        return Tiles(queries, pages, mask, self._in_order)

    def _mask(self, limits: Tensor, num_keys: int) -> Tensor:
        """Limits [rows, Q] -> what is added to scores, [rows, Q, K]."""
        hidden = torch.arange(num_keys, device=limits.device) >= limits[..., None]
        mask = limits.new_zeros(hidden.shape, dtype=self._cache.dtype)
        return mask.masked_fill_(hidden, -float("inf"))

    def _block_mask(self, pages: Tensor, limits: Tensor) -> BlockMask:
        """Pages [rows, pages], limits [rows, n / g * Q] -> the same mask over the whole cache.

        Made from the page tables: nothing of the cache's size is computed.
        """
        rows, num_pages = pages.shape
        pages, limits = pages.int(), limits.int()
        # Which page of the row each page of the cache is; -1: none.
        table = pages.new_full((rows, self._cache.num_pages + 1), -1)
        order = torch.arange(num_pages, dtype=torch.int32, device=pages.device)
        table.scatter_(1, pages.long(), order.expand(rows, -1))

        def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            page = table[b, key // PAGE_SIZE]
            return (page >= 0) & (page * PAGE_SIZE + key % PAGE_SIZE < limits[b, query])

        # Pages that all queries of the row see completely need no mask; those after them do.
        full = limits.amin(dim=1) // PAGE_SIZE
        visible = -(-limits.amax(dim=1) // PAGE_SIZE)
        partial = (full[:, None] + order).clamp_(max=num_pages - 1)
        return BlockMask(
            seq_lengths=(limits.shape[1], (self._cache.num_pages + 1) * PAGE_SIZE),
            kv_num_blocks=(visible - full)[:, None, None],
            kv_indices=pages.gather(1, partial.long())[:, None, None],
            full_kv_num_blocks=full[:, None, None],
            full_kv_indices=pages[:, None, None],
            q_num_blocks=None,
            q_indices=None,
            full_q_num_blocks=None,
            full_q_indices=None,
            BLOCK_SIZE=(FLEX_TILE, PAGE_SIZE),
            mask_mod=mask_mod,
        )

    def attend(
        self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, softmax_scale: float
    ) -> Tensor:
        """Write keys and values of the forward's tokens, then attend.

        Where ranks share sequences, S counts this rank's part of the tokens.

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
        if self._tiles is None:
            self._tiles = list(map(self._tiles_of, self._calls))
        if self._cache.shares is not None:
            return self._attend_together(
                layer_number, query, key, value, softmax_scale, self._cache.shares
            )
        padding = query.shape[0] - self.num_tokens
        if padding > 0:
            query, key, value = (x[: self.num_tokens] for x in (query, key, value))
        cached = self._cache.layer(layer_number)
        contexts = []
        if self._blocks is not None:
            contexts.append(self._blocks.attend(query, key, value, cached, softmax_scale))
        else:
            for own, new in zip(cached.unbind(0), (key, value), strict=True):
                own.index_copy_(0, self._write, new.squeeze(1))
        contexts += [tiles.attend(query, cached, softmax_scale)[0] for tiles in self._tiles]
        context = contexts[0] if len(contexts) == 1 else torch.cat(contexts)
        if not self._in_order:
            context = context.index_select(0, self._scatter)
        return F.pad(context, (0, 0, 0, 0, 0, 0, 0, padding)) if padding > 0 else context

    def _attend_together(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        softmax_scale: float,
        shares: TokenShares,
    ) -> Tensor:
        """As `attend`, where ranks share sequences."""
        own = shares.length(self.num_tokens)
        heads = [x.shape[2] for x in (query, key, value)]
        packed = torch.cat([x[:own, 0] for x in (query, key, value)], dim=1)
        padding = len(query) - own
        query, key, value = shares.gather(packed, self.num_tokens).split(heads, dim=1)
        context = shares.merge(*self.partial(layer_number, query, key, value, softmax_scale))
        return F.pad(context, (0, 0, 0, 0, 0, padding))[:, None]

    def partial(
        self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """Write what this rank keeps of all ranks' tokens, and attend to what it keeps.

        Args:
            layer_number: Megatron's, from 1.
            query: [S, n, d].
            key: [S, g, d].
            value: [S, g, d].
            softmax_scale: Factor on the scores.

        Returns:
            Context [S, n, d], and the log-sum-exp of the scores [S, n], see `Tiles.attend`.
        """
        if self._tiles is None:
            self._tiles = list(map(self._tiles_of, self._calls))
        cached = self._cache.layer(layer_number)
        cached[0].index_copy_(0, self._write, key.index_select(0, self._written))
        cached[1].index_copy_(0, self._write, value.index_select(0, self._written))
        calls = [
            tiles.attend(query, cached, softmax_scale, with_sums=True) for tiles in self._tiles
        ]
        context = torch.cat([context for context, _ in calls])
        sums = torch.cat([sums for _, sums in calls if sums is not None])
        return context.index_select(0, self._scatter), sums.index_select(0, self._scatter)
