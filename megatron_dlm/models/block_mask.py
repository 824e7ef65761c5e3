"""Block masks of FlexAttention, from which tiles of a row see which, without looking at each pair.

A tile holds a few runs of tokens of one document and stream, whose blocks ascend. Whether one run
sees another is known from their first and last blocks.

S: tokens of the row; T: tiles; R: runs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from megatron_dlm import platform
from megatron_dlm.models.attention_layout import CLEAN, PADDING_DOCUMENT, Field, visible


@dataclass(frozen=True)
class TileVisibility:
    """What tiles of queries see of tiles of keys.

    Attributes:
        some: [T, T] bool, whether any token of the first sees any of the second.
        all: [T, T] bool, whether every token of the first sees every one of the second. Annealed
            attention draws for each pair: there, tiles may be in `some` that see nothing, and not
            in `all` though they see everything.
    """

    some: Tensor
    all: Tensor


def tile_visibility(layout: Tensor, tile: int) -> TileVisibility:
    """Compute the tables in O(S + T^2 + pairs of runs of the same document).

    Args:
        layout: [4, S] to [6, S] int32 on the CPU; blocks ascend in each stream of a document.
        tile: Tokens of a tile; the last one may be shorter.
    """
    length = layout.shape[1]
    tiles = -(-length // tile)
    tile_of = torch.arange(length) // tile
    run_keys = torch.stack((layout[Field.DOCUMENT], layout[Field.STREAM], tile_of.int()))
    starts = torch.ones(length, dtype=torch.bool)
    starts[1:] = (run_keys[:, 1:] != run_keys[:, :-1]).any(0)
    begin = starts.nonzero()[:, 0]
    end = torch.cat((begin[1:], torch.tensor([length]))) - 1
    document, stream, of_tile = run_keys[:, begin].long()
    first, last = layout[Field.BLOCK][begin], layout[Field.BLOCK][end]

    real = (document != PADDING_DOCUMENT).nonzero()[:, 0]
    real = real[document[real].argsort(stable=True)]
    _, sizes = document[real].unique_consecutive(return_counts=True)
    partners = sizes.repeat_interleave(sizes)  # runs of the document of each run
    query = real.repeat_interleave(partners)
    offset = torch.arange(len(query)) - (partners.cumsum(0) - partners).repeat_interleave(partners)
    document_start = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    key = real[document_start.repeat_interleave(partners) + offset]

    query_clean, key_clean = stream[query] == CLEAN, stream[key] == CLEAN
    reaches, covers = first[key] < last[query], last[key] < first[query]
    reaches |= query_clean & (first[key] == last[query])
    covers |= query_clean & (last[key] == first[query])
    if len(layout) > Field.ANNEALING_THRESHOLD:
        reaches |= query_clean
    same_stream = stream[query] == stream[key]
    overlap = (first[key] <= last[query]) & (first[query] <= last[key])
    one_block = (first[key] == last[query]) & (first[query] == last[key]) & overlap
    one_block &= first[key] == last[key]
    some = torch.where(key_clean, reaches, same_stream & overlap)
    every = torch.where(key_clean, covers, same_stream & one_block)

    pair = of_tile[query] * tiles + of_tile[key]
    runs = of_tile.bincount(minlength=tiles)
    runs[-1] += length % tile > 0  # what is missing of the last tile is seen by nobody
    counts = [
        pair[chosen].bincount(minlength=tiles * tiles).view(tiles, tiles)
        for chosen in (some, every)
    ]
    return TileVisibility(counts[0] > 0, counts[1] == runs[:, None] * runs[None, :])


def block_mask(layout: Tensor, tile: int) -> BlockMask:
    """The block mask of a row.

    Args:
        layout: [4, S] to [6, S] int32, on any device.
        tile: Tokens of a tile.
    """
    # FlexAttention traces the rule for one query and one key, which index plain vectors.
    fields = layout.unbind(0)

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible([field[query] for field in fields], [field[key] for field in fields])

    table = tile_visibility(platform.to_host(layout), tile)
    length = layout.shape[1]
    mask: BlockMask = BlockMask.from_kv_blocks(
        *_ordered(table.some & ~table.all),
        *_ordered(table.all),
        BLOCK_SIZE=tile,
        mask_mod=mask_mod,
        seq_lengths=(length, length),
    )
    return mask.to(str(layout.device))


def _ordered(table: Tensor) -> tuple[Tensor, Tensor]:
    """A table [T, T] as FlexAttention has it: numbers [1, 1, T] and indices [1, 1, T, T]."""
    indices = table.int().argsort(dim=1, descending=True, stable=True)
    return table.sum(1).int()[None, None], indices.int()[None, None]
