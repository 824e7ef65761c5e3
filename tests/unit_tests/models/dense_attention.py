"""The visibility rule in words, attention by a dense softmax, and rows to try them on."""

import math
from typing import get_args

import torch
from hypothesis import strategies as st

from megatron_dlm.models.attention_layout import (
    DRAW_UNIT,
    block_diffusion_block_ids,
    clean_layout,
    pad_layout,
)
from megatron_dlm.types.diffusion_kind import ContextAttention

CLEAN = 0


def sees(query: list[int], key: list[int]) -> bool:
    """Section 2 of the method, in words: one query, one key, [document, block, stream,
    position] and under annealing [key, threshold]."""
    if query[0] == -1 or query[0] != key[0]:
        return False
    if len(query) == 6 and query[2] == key[2] == CLEAN and pair_draw(query[4], key[4]) < query[5]:
        return True
    if query[2] == CLEAN:
        return key[2] == CLEAN and key[1] <= query[1]
    if key[2] == CLEAN:
        return key[1] < query[1]
    return key[1] == query[1] and key[2] == query[2]


def pair_draw(query: int, key: int) -> int:
    """The draw of one pair, in Python's integers."""
    x = (query * 0x5BD1E995 + key) % 2**32
    for multiplier in (0x7FEB352D, 0x31848BAB):
        x = (x ^ (x // 2**15)) * multiplier % 2**32
    return (x ^ (x // 2**14)) // 2**8


def dense_mask(layout: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
    """What the tokens of a layout see of each other, or of other keys."""
    queries = layout.T.tolist()
    tokens = queries if keys is None else keys.T.tolist()
    return torch.tensor([[sees(query, key) for key in tokens] for query in queries])


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: torch.Tensor, scale: float
) -> torch.Tensor:
    mask = dense_mask(layout)
    repeat = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(repeat, dim=2) for x in (key, value))
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) * scale
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.einsum("bnst,tbnd->sbnd", weights.nan_to_num(0.0), value)


@st.composite
def layouts(draw: st.DrawFn) -> torch.Tensor:
    """Rows of documents with a clean stream and noisy streams of some of its blocks."""
    block_size = draw(st.integers(1, 5))
    context = draw(st.sampled_from(get_args(ContextAttention)))
    parts = []
    for document in range(draw(st.integers(1, 4))):
        length = draw(st.integers(1, 13))
        position = torch.arange(length)
        clean = clean_layout([length], "block_causal", block_size)
        part = clean
        for stream in range(1, draw(st.integers(0, 3)) + 1):
            blocks = sorted(draw(st.sets(st.integers(0, (length - 1) // block_size), min_size=1)))
            noisy = torch.cat([position[position // block_size == b] for b in blocks]).int()
            copy = (torch.zeros_like(noisy), noisy // block_size, noisy * 0 + stream, noisy)
            part = torch.cat((part, torch.stack(copy)), dim=1)
        part[1] = block_diffusion_block_ids(part[3], part[2], block_size, context)
        part[0] = document
        parts.append(part)
    row = torch.cat(parts, dim=1)
    if draw(st.booleans()):
        seed = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
        keys = torch.randint(0, 2**31 - 1, (row.shape[1],), generator=seed)
        threshold = draw(st.sampled_from([0, 1, DRAW_UNIT // 3, DRAW_UNIT]))
        annealing = torch.stack((keys, torch.full_like(keys, threshold)))
        row = torch.cat((row, annealing.int()))
    return pad_layout(row, row.shape[1] + draw(st.integers(0, 3)))


def in_tiles(mask: torch.Tensor, tile: int) -> torch.Tensor:
    """A mask [S, K] as [T, U, tile * tile], nothing visible beyond the end of the row."""
    queries, keys = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -keys % tile, 0, -queries % tile))
    shape = (len(padded) // tile, tile, padded.shape[1] // tile, tile)
    return padded.view(shape).transpose(1, 2).flatten(2)
