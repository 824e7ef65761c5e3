"""A packed row as padded batches of tiles of queries and the keys that they see, for dense kernels.

A tile is of one document, whose clean tokens come first and then its noisy ones, by block. What it
sees are a prefix of the clean tokens, and the noisy tokens from its first block to its last one: of
a long document half of the clean pairs, and next to none of the noisy ones.

S: queries of the row. R: tiles of a batch; L: queries of its longest one, K: keys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.models.attention_layout import (
    CLEAN,
    PADDING_DOCUMENT,
    Field,
    queries_and_keys,
    visible,
)

SHORT = 128
"""Tokens up to which a document is one tile, and keys that are not worth a batch of their own."""

TILE = 64
"""Queries of a tile; a sixteenth of a document that has many more."""


@dataclass(frozen=True)
class TileBatch:
    """Tiles with similar numbers of keys, padded.

    Attributes:
        queries: [R * L] int64, index of each query (0 where padded).
        keys: [R * K] int64, index of each key (0 where padded).
        mask: [R, 1, L, K] bool, true where visible. Padded queries see everything, so that no
            softmax is empty.
        is_padding: [R * L, 1, 1] bool for padded queries.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor
    is_padding: Tensor


@dataclass(frozen=True)
class TileBatches:
    """All tiles of a row.

    Attributes:
        batches: None in a row of padding.
        scatter: [S] int64, index into the batches laid end to end of each query (0 for padding
            tokens).
        is_padding: [S, 1, 1] bool for the padding among the queries, or None if there is none.
    """

    batches: Sequence[TileBatch]
    scatter: Tensor
    is_padding: Tensor | None


def tile_batches(layout: Tensor, queries: int, keys: int, cuts: bool) -> TileBatches:
    """Cut a row into tiles; no pair of different documents is computed.

    Args:
        layout: As in `queries_and_keys`.
        queries: Number of queries.
        keys: Number of keys.
        cuts: Whether documents are cut; else each is one tile, and none of its keys in two.
    """
    # On the host, which needs the numbers: one wait for the device, not one for each step.
    asking, asked = queries_and_keys(platform.to_host(layout), queries, keys)
    tiles = sorted(_tiles(asking.numpy(), asked.numpy(), cuts), key=lambda tile: -len(tile[1]))
    groups = [tiles[group] for group in _of_similar_size([len(seen) for _, seen in tiles])]
    places, scatter, end = [], np.zeros(queries, np.int64), 0
    for group in groups:
        query_places, key_places = (_padded(rows) for rows in zip(*group, strict=True))
        for (tile, _), first in zip(
            group, range(end, end + query_places.size, query_places.shape[1]), strict=True
        ):
            scatter[tile] = np.arange(first, first + len(tile))
        end += query_places.size
        places += [query_places, key_places]
    scatter_there, *places_there = platform.to_device(*map(torch.from_numpy, (scatter, *places)))
    query_fields, key_fields = queries_and_keys(layout, queries, keys)
    is_padding = asking[Field.DOCUMENT] == PADDING_DOCUMENT
    return TileBatches(
        batches=[
            _batch(query_fields, key_fields, *pair)
            for pair in zip(places_there[::2], places_there[1::2], strict=True)
        ],
        scatter=scatter_there,
        is_padding=is_padding[:, None, None].to(layout.device) if is_padding.any() else None,
    )


def _batch(
    query_fields: Tensor, key_fields: Tensor, query_places: Tensor, key_places: Tensor
) -> TileBatch:
    """A batch of queries [R, L] and keys [R, K] of a row, -1 where there is none."""
    no_query, no_key = query_places < 0, key_places < 0
    queries, keys = query_places.clamp(min=0), key_places.clamp(min=0)
    mask = visible(query_fields[:, queries, None], key_fields[:, keys][:, :, None])
    mask = mask & ~no_key[:, None] | no_query[..., None]
    return TileBatch(queries.flatten(), keys.flatten(), mask[:, None], no_query.view(-1, 1, 1))


def _tiles(
    asking: np.ndarray, asked: np.ndarray, cuts: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each tile of a row: indices of its queries, and of keys among which are all that it sees."""
    is_annealed = len(asking) > Field.ANNEALING_THRESHOLD
    queries, keys = _in_order(asking), _in_order(asked)
    of_query, of_key = (
        fields[Field.DOCUMENT][order] for fields, order in ((asking, queries), (asked, keys))
    )
    streams = int(asked[Field.STREAM].max(initial=0)) + 1

    def noisy_block(fields: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return fields[Field.BLOCK][tokens].astype(np.int64) * streams + fields[Field.STREAM][tokens]

    for document in np.unique(of_query):
        own = queries[slice(*np.searchsorted(of_query, (document, document + 1)))]
        others = keys[slice(*np.searchsorted(of_key, (document, document + 1)))]
        num_clean = int((asked[Field.STREAM][others] == CLEAN).sum())
        clean, noisy = others[:num_clean], others[num_clean:]
        clean_blocks, noisy_blocks = asked[Field.BLOCK][clean], noisy_block(asked, noisy)
        # Where each clean token may see all of them, to cut them saves nothing.
        see_all = is_annealed or (num_clean and clean_blocks[0] == clean_blocks[-1])
        uncut = int((asking[Field.STREAM][own] == CLEAN).sum()) if see_all else 0
        size = max(TILE, -(-len(own) // 16))
        tiles = [own]
        if cuts and len(own) > SHORT:
            rest = own[uncut:]
            tiles = [own[:uncut], *np.array_split(rest, max(-(-len(rest) // size), 1))]
        for tile in filter(len, tiles):
            is_clean = asking[Field.STREAM][tile] == CLEAN
            end = (asking[Field.BLOCK][tile] + is_clean).max()
            seen = (
                clean if is_annealed and is_clean.any() else clean[: clean_blocks.searchsorted(end)]
            )
            if not is_clean[-1]:
                blocks = noisy_block(asking, tile[~is_clean])
                first = noisy_blocks.searchsorted(blocks[0])
                last = noisy_blocks.searchsorted(blocks[-1], side="right")
                seen = np.concatenate((seen, noisy[first:last]))
            yield tile, seen


def _in_order(fields: np.ndarray) -> np.ndarray:
    """Tokens but for padding: by document, clean ones first, then by block and stream."""
    stream = fields[Field.STREAM]
    by = stream, fields[Field.BLOCK], stream != CLEAN, fields[Field.DOCUMENT]
    order = np.lexsort(by)
    order = order[fields[Field.DOCUMENT][order] != PADDING_DOCUMENT]
    return order


def _of_similar_size(sizes: Sequence[int]) -> list[slice]:
    """Runs of descending sizes, none of which is below three quarters of its run's first.

    Short ones stay together: another kernel would cost more than padding them.
    """
    starts: list[int] = []
    for number, size in enumerate(sizes):
        if not starts or 4 * max(size, SHORT) < 3 * sizes[starts[-1]]:
            starts.append(number)
    return [slice(*ends) for ends in pairwise([*starts, len(sizes)])]


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of indices below each other, -1 where one is shorter."""
    padded = np.full((len(rows), max(map(len, rows))), -1, np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded
