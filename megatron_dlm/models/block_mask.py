"""Block masks of FlexAttention, from which tiles of a row see which, without looking at each pair.

A tile holds a few runs of tokens of one document and stream, whose blocks ascend. Whether one run
sees another is known from their first and last blocks.

S: tokens; T, U: tiles of queries and of keys; R: runs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from megatron_dlm import platform
from megatron_dlm.models.attention_layout import (
    CLEAN,
    PADDING_DOCUMENT,
    Field,
    queries_and_keys,
    visible,
)


@dataclass(frozen=True)
class TileVisibility:
    """What tiles of queries see of tiles of keys.

    Attributes:
        some: [T, U] bool, whether any token of the first sees any of the second.
        all: [T, U] bool, whether every token of the first sees every one of the second. Annealed
            attention draws for each pair: there, tiles may be in `some` that see nothing, and not
            in `all` though they see everything.
    """

    some: Tensor
    all: Tensor


@dataclass(frozen=True)
class _Runs:
    """The runs of a layout.

    Attributes:
        document: [R], `PADDING_DOCUMENT` for padding.
        stream: [R].
        tile: [R], the tile that it lies in.
        first: [R], its first block.
        last: [R], its last block.
        of_tile: [T], runs of each tile; what is missing of the last tile counts as one.
    """

    document: Tensor
    stream: Tensor
    tile: Tensor
    first: Tensor
    last: Tensor
    of_tile: Tensor

    @classmethod
    def of(cls, layout: Tensor, tile: int) -> "_Runs":
        length, block = layout.shape[1], layout[Field.BLOCK]
        tile_of = torch.arange(length) // tile
        run_keys = torch.stack((layout[Field.DOCUMENT], layout[Field.STREAM], tile_of.int()))
        starts = torch.ones(length, dtype=torch.bool)
        starts[1:] = (run_keys[:, 1:] != run_keys[:, :-1]).any(0)
        starts[1:] |= block[1:] < block[:-1]  # from the tokens of one rank to those of the next
        begin = starts.nonzero()[:, 0]
        end = torch.cat((begin[1:], torch.tensor([length]))) - 1
        document, stream, of_run = run_keys[:, begin].long()
        of_tile = of_run.bincount(minlength=-(-length // tile))
        of_tile[-1] += length % tile > 0
        return cls(document, stream, of_run, block[begin], block[end], of_tile)


def tile_visibility(queries: Tensor, keys: Tensor, tile: int) -> TileVisibility:
    """Compute the tables in O(tokens + T U + pairs of runs of the same document).

    Args:
        queries: [4, S] to [6, S] int32 on the CPU.
        keys: Likewise; the same for a row whose tokens are queries and keys both.
        tile: Tokens of a tile; the last one may be shorter.
    """
    asking, asked = _Runs.of(queries, tile), _Runs.of(keys, tile)
    real = (asked.document != PADDING_DOCUMENT).nonzero()[:, 0]
    real = real[asked.document[real].argsort(stable=True)]
    documents = 1 + max(int(asking.document.max()), int(asked.document.max()))
    sizes = asked.document[real].bincount(minlength=documents)  # runs of each document
    query = (asking.document != PADDING_DOCUMENT).nonzero()[:, 0]
    partners = sizes[asking.document[query]]
    document_start = (sizes.cumsum(0) - sizes)[asking.document[query]]
    query = query.repeat_interleave(partners)
    offset = torch.arange(len(query)) - (partners.cumsum(0) - partners).repeat_interleave(partners)
    key = real[document_start.repeat_interleave(partners) + offset]

    query_clean, key_clean = asking.stream[query] == CLEAN, asked.stream[key] == CLEAN
    query_first, query_last = asking.first[query], asking.last[query]
    key_first, key_last = asked.first[key], asked.last[key]
    reaches, covers = key_first < query_last, key_last < query_first
    reaches |= query_clean & (key_first == query_last)
    covers |= query_clean & (key_last == query_first)
    if len(queries) > Field.ANNEALING_THRESHOLD:
        reaches |= query_clean
    same_stream = asking.stream[query] == asked.stream[key]
    overlap = (key_first <= query_last) & (query_first <= key_last)
    one_block = (key_first == query_last) & (query_first == key_last) & overlap
    one_block &= key_first == key_last
    some = torch.where(key_clean, reaches, same_stream & overlap)
    every = torch.where(key_clean, covers, same_stream & one_block)

    shape = (len(asking.of_tile), len(asked.of_tile))
    pair = asking.tile[query] * shape[1] + asked.tile[key]
    counts = [
        pair[chosen].bincount(minlength=shape[0] * shape[1]).view(shape) for chosen in (some, every)
    ]
    whole = asking.of_tile[:, None] * asked.of_tile[None, :]
    return TileVisibility(counts[0] > 0, counts[1] == whole)


def block_mask(layout: Tensor, queries: int, keys: int, tile: int) -> BlockMask:
    """The block mask of a row.

    Args:
        layout: [4, S] to [6, S] int32, on any device, as in `queries_and_keys`.
        queries: Number of queries.
        keys: Number of keys.
        tile: Tokens of a tile.
    """
    table = tile_visibility(*queries_and_keys(platform.to_host(layout), queries, keys), tile)
    # FlexAttention traces the rule for one query and one key, which index plain vectors.
    asking, asked = (fields.unbind(0) for fields in queries_and_keys(layout, queries, keys))

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible([field[query] for field in asking], [field[key] for field in asked])

    mask: BlockMask = BlockMask.from_kv_blocks(
        *_ordered(table.some & ~table.all),
        *_ordered(table.all),
        BLOCK_SIZE=tile,
        mask_mod=mask_mod,
        seq_lengths=(queries, keys),
    )
    return mask.to(str(layout.device))


def _ordered(table: Tensor) -> tuple[Tensor, Tensor]:
    """A table [T, U] as FlexAttention has it: numbers [1, 1, T] and indices [1, 1, T, U]."""
    indices = table.int().argsort(dim=1, descending=True, stable=True)
    return table.sum(1).int()[None, None], indices.int()[None, None]
