"""Core attention of student and teacher: any visibility pattern over packed rows.

Replaces Megatron's `DotProductAttention` in the layer spec. Visibility is decided by the
`attention_mask` argument, which Megatron passes on unchanged: a layout tensor
(`megatron_dlm.models.attention_layout`) in training, or a `CachedAttention` in a rollout. Under
context parallelism the layout of a rank's share of a row has more tokens than the share: keys and
values of the clean ones among them are gathered (`megatron_dlm.models.context_parallel`).

S: tokens of the packed row or of a share of one; K: keys; n: query heads, g: key/value heads of
this tensor-parallel rank; d: head size; R: tiles of queries, L: queries of one.
"""

import functools
import math
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.fx.experimental import _config as fx_config
from torch.nn.attention import SDPBackend
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_dlm.models.attention_layout import Field, LayoutCache
from megatron_dlm.models.block_mask import block_mask
from megatron_dlm.models.query_tiles import TileBatch, TileBatches, tile_batches

# FlexAttention works in tiles of this many tokens and is fastest when the row is a multiple of it.
FLEX_TILE = 128

_WITH_SUMS: dict[str, Any] = (
    {"return_aux": torch_flex.AuxRequest(lse=True)}
    if hasattr(torch_flex, "AuxRequest")  # from PyTorch 2.9 on, which then drops the other one
    else {"return_lse": True}
)
"""What makes FlexAttention return the log-sum-exp of its scores."""

_tile_batches = LayoutCache(tile_batches)


def _biases(
    layout: Tensor, queries: int, keys: int, cuts: bool, dtype: torch.dtype
) -> list[Tensor]:
    """What is added to the scores of each batch of tiles of a row: [R, 1, L, K], 0 or -inf.

    PyTorch's kernels take no other masks. Made of a boolean one in each layer, each would be kept
    for backward: S^2 numbers a layer.
    """
    return [
        torch.zeros_like(batch.mask, dtype=dtype).masked_fill_(~batch.mask, -math.inf)
        for batch in _tile_batches(layout, queries, keys, cuts).batches
    ]


# Of one row: they are many times as large as what they are made of.
_biases_of_row = LayoutCache(_biases, capacity=1)


def release_masks() -> None:
    """Free what the layers of the last row had in common; to be called after the last one."""
    _biases_of_row.clear()


@runtime_checkable
class CachedAttention(Protocol):
    """Attention against a KV cache, implemented by `megatron_dlm.rollout.kv_cache`."""

    def attend(
        self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, softmax_scale: float
    ) -> Tensor:
        """Store keys and values [S, 1, g, d] and return the context [S, 1, n, d] of the queries."""
        ...


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Tensor, softmax_scale: float
) -> Tensor:
    """Reference backend: PyTorch's scaled dot product attention over tiles of a row's queries.

    Args:
        query: [S, 1, n, d].
        key: [K, 1, g, d].
        value: [K, 1, g, d].
        layout: Of 4 to 6 rows, int32, as in `attention_layout.queries_and_keys`.
        softmax_scale: Factor on the scores.

    Returns:
        Context [S, 1, n, d]; zero for padding tokens.
    """
    # The switch is the one of `torch.nn.attention.sdpa_kernel`, for the CPU too.
    fused = query.is_cpu and torch.backends.cuda.flash_sdp_enabled()
    fused = fused and _has_cpu_kernel(query.dtype, query.shape[2], *key.shape[2:])
    # Without it, keys of each tile would be kept for backward.
    of_row = layout, len(query), len(key), fused
    row = _tile_batches(*of_row)
    if not row.batches:  # a row of padding only: the rank just takes part in collectives
        return query * 0.0 + (key.sum() + value.sum()) * 0.0
    biases = _biases_of_row(*of_row, query.dtype)
    read = query[:, 0], key[:, 0], value[:, 0]
    if fused:
        context: Tensor = _TileAttention.apply(*read, row, softmax_scale, *biases)
        return context[:, None]
    contexts = []
    for batch, bias in zip(row.batches, biases, strict=True):
        context = F.scaled_dot_product_attention(
            *_of_tiles(*read, batch),
            attn_mask=bias,
            scale=softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        contexts.append(context.transpose(1, 2).flatten(0, 1))
    return _of_row(contexts, row)[:, None]


def _by_tile(x: Tensor, tokens: Tensor, tiles: int) -> Tensor:
    """Of x [tokens, heads, d] those of each tile, [R, heads, L or K, d]."""
    return x.index_select(0, tokens).unflatten(0, (tiles, -1)).transpose(1, 2)


def _of_tiles(
    query: Tensor, key: Tensor, value: Tensor, batch: TileBatch
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = len(batch.mask)
    keys, values = (_by_tile(x, batch.keys, tiles) for x in (key, value))
    return _by_tile(query, batch.queries, tiles), keys, values


def _of_row(tiles: list[Tensor], row: TileBatches) -> Tensor:
    """Of each batch [R * L, n, d] -> [S, n, d], zero for padding tokens."""
    x = (torch.cat(tiles) if len(tiles) > 1 else tiles[0]).index_select(0, row.scatter)
    return x if row.is_padding is None else x.masked_fill_(row.is_padding, 0.0)


@functools.cache
def _has_cpu_kernel(dtype: torch.dtype, heads: int, groups: int, size: int) -> bool:
    """Whether PyTorch's has, whose versions differ in whether keys may have fewer heads."""
    query, key = (torch.zeros(1, number, 1, size, dtype=dtype) for number in (heads, groups))
    bias = torch.zeros(1, 1, 1, 1, dtype=dtype)
    chosen = torch._fused_sdp_choice(query, key, key, attn_mask=bias, enable_gqa=True)
    return bool(chosen == SDPBackend.FLASH_ATTENTION.value)


class _TileAttention(torch.autograd.Function):
    """PyTorch's kernel on the CPU, which keeps no copy of queries, keys and values by tile."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        row: TileBatches,
        softmax_scale: float,
        *biases: Tensor,
    ) -> Tensor:
        contexts, sums = [], []
        for batch, bias in zip(row.batches, biases, strict=True):
            context, sum_ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *_of_tiles(query, key, value, batch), attn_mask=bias, scale=softmax_scale
            )
            contexts.append(context.transpose(1, 2).flatten(0, 1))
            sums.append(sum_)
        result = _of_row(contexts, row)
        ctx.save_for_backward(query, key, value, result, *sums, *biases)
        ctx.row, ctx.softmax_scale = row, softmax_scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, *others = ctx.saved_tensors
        row = ctx.row
        batches = row.batches
        of_queries, of_key, of_value = [], torch.zeros_like(key), torch.zeros_like(value)
        for number, batch in enumerate(batches):
            sums, bias = others[number], others[len(batches) + number]
            tiles = len(bias)
            own = gradient.index_select(0, batch.queries).masked_fill_(batch.is_padding, 0.0)
            backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            found = backward(
                own.unflatten(0, (tiles, -1)).transpose(1, 2),
                *_of_tiles(query, key, value, batch),
                _by_tile(result, batch.queries, tiles),
                sums,
                0.0,
                False,
                attn_mask=bias,
                scale=ctx.softmax_scale,
            )
            of_query, of_tile_key, of_tile_value = (x.transpose(1, 2).flatten(0, 1) for x in found)
            of_queries.append(of_query)
            of_key.index_add_(0, batch.keys, of_tile_key)
            of_value.index_add_(0, batch.keys, of_tile_value)
        return _of_row(of_queries, row), of_key, of_value, None, None, *[None] * len(batches)


_block_masks = LayoutCache(functools.partial(block_mask, tile=FLEX_TILE))


@functools.cache
def _compiled_flex_attention() -> Any:
    # Rows differ in length; recompiling for each would cost more than the kernel saves. Where there
    # are still too many kinds, `fullgraph` raises: PyTorch would go on uncompiled, with all scores.
    # Two sizes that are equal in the first call are not always: that would be another kind.
    fx_config.use_duck_shape = False
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def flex_attention_over_row(
    query: Tensor, key: Tensor, value: Tensor, layout: Tensor, softmax_scale: float
) -> Tensor:
    """FlexAttention with a block-sparse mask; arguments and result as `sdpa_attention`.

    Compiled on CUDA. On a CPU it runs uncompiled and has no backward: for tests only. A row of one
    tile, for which there is nothing to skip and not always a kernel, takes the reference backend.
    """
    if len(query) <= FLEX_TILE:
        return sdpa_attention(query, key, value, layout, softmax_scale)

    def heads_first(x: Tensor) -> Tensor:  # [S, 1, heads, d] -> [1, heads, S, d]
        return x.permute(1, 2, 0, 3)

    attend = _compiled_flex_attention() if query.is_cuda else flex_attention
    context = attend(
        heads_first(query),
        heads_first(key),
        heads_first(value),
        block_mask=_block_masks(layout, len(query), len(key)),
        scale=softmax_scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    is_padding = (layout[Field.DOCUMENT, -len(query) :] < 0)[:, None, None, None]
    return context.permute(2, 0, 1, 3).masked_fill(is_padding, 0.0)


def flex_attention_over_pages(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_mask: BlockMask,
    softmax_scale: float,
    *,
    with_sums: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """FlexAttention of rows of queries against one pool of keys, without gradients.

    Compiled on CUDA, where only the tiles that `block_mask` lists are read.

    Args:
        query: [rows, g, Q, d].
        keys: [1, g, K, d], of all sequences.
        values: [1, g, K, d].
        block_mask: Of [rows, 1, Q, K].
        softmax_scale: Factor on the scores.
        with_sums: Whether the log-sum-exp of the scores is wanted too.

    Returns:
        Context [rows, g, Q, d], zero where a query sees nothing; and if wanted [rows, g, Q],
        float32, there minus infinity.
    """
    # The largest tiles that hold no padding: rows are short, and a tile of keys is within a page.
    queries = 1 << max(4, (query.shape[2] - 1).bit_length())
    tiles = {"BLOCK_M": min(queries, FLEX_TILE), "BLOCK_N": block_mask.BLOCK_SIZE[1]}
    attend = _compiled_flex_attention() if query.is_cuda else flex_attention
    options: dict[str, Any] = _WITH_SUMS if with_sums else {}
    found = attend(
        query,
        keys,
        values,
        block_mask=block_mask,
        scale=softmax_scale,
        kernel_options=tiles,
        **options,
    )
    if not with_sums:
        return found, None
    context, aux = found
    sums = aux if isinstance(aux, Tensor) else aux.lse
    sees_nothing = sums == -math.inf
    return context.masked_fill(sees_nothing[..., None], 0.0), sums


def gather_shared(
    key: Tensor, value: Tensor, shared: int, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Keys and values that a share sees some of: all ranks' clean ones, then its own noisy ones.

    The backward pass adds up the gradients of all ranks where the clean tokens came from.

    Args:
        key: [S, 1, g, d], of a share.
        value: [S, 1, g, d].
        shared: Clean tokens of all ranks, padding included.
        group: The ranks.

    Returns:
        Two tensors [K, 1, g, d].
    """
    own = shared // group.size()
    clean = torch.stack((key[:own], value[:own]), dim=1)  # one message, not two
    gathered = gather_from_sequence_parallel_region(clean, group=group)
    return torch.cat((gathered[:, 0], key[own:])), torch.cat((gathered[:, 1], value[own:]))


_BACKENDS = {"sdpa": sdpa_attention, "flex": flex_attention_over_row}


class DiffusionAttention(MegatronModule):
    """Core attention module of the layer spec; constructor arguments as `DotProductAttention`'s."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        backend: str = "sdpa",
    ) -> None:
        super().__init__(config=config)
        self.layer_number = max(1, layer_number)
        head_size = config.kv_channels
        assert head_size is not None
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(head_size)
        self.cp_group = None if pg_collection is None else pg_collection.cp
        self.backend_name = backend
        self.backend = _BACKENDS[backend]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | CachedAttention,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend within the row; [S, 1, n, d], [S, 1, g, d], [S, 1, g, d] -> [S, 1, n * d]."""
        if isinstance(attention_mask, Tensor):
            shared = attention_mask.shape[1] - len(query)
            if shared:
                assert self.cp_group is not None
                key, value = gather_shared(key, value, shared, self.cp_group)
            context = self.backend(query, key, value, attention_mask, self.softmax_scale)
        else:
            context = attention_mask.attend(
                self.layer_number, query, key, value, self.softmax_scale
            )
        return context.flatten(2)
