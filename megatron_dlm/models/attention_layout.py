"""Which tokens see which: one visibility rule for every attention pattern of the framework.

Tokens of a packed row carry four integers (`Field`): document, block, stream and position. A query
sees a key of the same document if

* both are clean and the key's block is not later than the query's (block-causal), or
* the query is noisy, the key clean, and the key's block strictly earlier, or
* both are of the same noisy stream and the same block.

A layout may have a fifth row, a random integer per token (its key), from which random draws inside
the layers are computed. With annealed attention a sixth row holds a threshold: a clean query also
sees a later clean key of its document if the draw of the pair is below the query's threshold.

Stream 0 is clean; noisy streams count from 1, one for each state in which a sequence is trained at
once. Patterns differ in block ids only: `block_causal` takes position // block_size, `causal` is
block size 1, `full` puts everything into block 0. Block diffusion training adds the noisy stream.
With a causal context (`block_diffusion_block_ids`) the clean stream has block size 1, and the id of
a noisy block is its first position.
Sources: BD3-LM (Arriola et al. 2025) for the three-part mask; OPDLM section 3 for its use here;
DiffuLLaMA (Gong et al. 2025) for annealing, a Bernoulli draw for each pair.

S: tokens of a packed row.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.types.diffusion_kind import ContextAttention

Pattern = Literal["block_causal", "causal", "full"]
CLEAN = 0
PADDING_DOCUMENT = -1


class Field:
    """Rows of a layout tensor [4, S] int32; [5, S] with keys, [6, S] with annealed attention."""

    # Plain integers, no enumeration: FlexAttention compiles the rule that uses them.
    DOCUMENT = 0
    BLOCK = 1
    STREAM = 2
    POSITION = 3
    KEY = 4
    ANNEALING_THRESHOLD = 5


DRAW_UNIT = 2**24
"""Upper bound of a pair's draw (exclusive); as a threshold it makes every pair visible."""


def block_ids(positions: Tensor, pattern: Pattern, block_size: int) -> Tensor:
    """Block id of each position under a single-stream pattern; same shape as `positions`."""
    if pattern == "causal":
        return positions
    if pattern == "full":
        return torch.zeros_like(positions)
    return positions // block_size


def block_diffusion_block_ids(
    positions: Tensor, stream: Tensor, block_size: int, context_attention: ContextAttention
) -> Tensor:
    """Block ids of a clean stream and noisy streams of its blocks.

    Noisy block b sees the clean tokens before its first one, whether the clean stream itself is
    block-causal or causal.

    Args:
        positions: [T].
        stream: [T], `CLEAN` or the number of a noisy stream.
        block_size: Tokens of a noisy block.
        context_attention: What clean tokens see of each other.

    Returns:
        [T], of the type of `positions`; ascending in each stream.
    """
    blocks = positions // block_size
    if context_attention == "block_causal":
        return blocks
    return torch.where(stream == CLEAN, positions, blocks * block_size)


def clean_layout(lengths: list[int], pattern: Pattern, block_size: int) -> Tensor:
    """Layout [4, sum(lengths)] of clean documents laid end to end, each from position 0."""
    positions = torch.cat([torch.arange(length, dtype=torch.int32) for length in [0, *lengths]])
    documents = torch.repeat_interleave(
        torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths, dtype=torch.int64)
    )
    return torch.stack(
        (
            documents,
            block_ids(positions, pattern, block_size),
            torch.full_like(positions, CLEAN),
            positions,
        )
    )


def pad_layout(layout: Tensor, length: int) -> Tensor:
    """Append padding tokens up to `length`; they see nothing and no token sees them.

    A layout of that length is returned unchanged, so that cached values derived from it are found.
    """
    missing = length - layout.shape[1]
    if not missing:
        return layout
    padding = torch.zeros(len(layout), missing, dtype=layout.dtype, device=layout.device)
    padding[Field.DOCUMENT] = PADDING_DOCUMENT
    return torch.cat((layout, padding), dim=1)


def pair_draws(query: Tensor, key: Tensor) -> Tensor:
    """The draw of each pair of keys, uniform over the integers below `DRAW_UNIT`.

    A hash of two random integers: it needs no table of pairs, so that a kernel can compute it for
    the tile it works on, and activation recomputation finds the same mask again.

    Args:
        query: Random int32 >= 0 of each query (`Field.KEY`).
        key: The same of each key; broadcasts against the queries.
    """
    # In 64 bits no product of 32 and 31 bits overflows; multipliers are odd, so that each step is a
    # bijection.
    mixed = (query.long() * 0x5BD1E995 + key.long()) & 0xFFFFFFFF
    for multiplier in (0x7FEB352D, 0x31848BAB):
        mixed = ((mixed ^ (mixed >> 15)) * multiplier) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 14)) >> 8


def visible(query: Tensor | Sequence[Tensor], key: Tensor | Sequence[Tensor]) -> Tensor:
    """The visibility rule.

    Args:
        query: Layout fields of queries, [4, ...] or four tensors; six with annealed attention.
        key: Layout fields of keys; their shapes broadcast against the query's.

    Returns:
        Boolean tensor of the broadcast shape, true where the query sees the key.
    """
    query_clean = query[Field.STREAM] == CLEAN
    key_clean = key[Field.STREAM] == CLEAN
    same_block = query[Field.BLOCK] == key[Field.BLOCK]
    earlier = key[Field.BLOCK] < query[Field.BLOCK]
    sees_clean = key_clean & (earlier | (query_clean & same_block))
    if len(query) > Field.ANNEALING_THRESHOLD:
        draws = pair_draws(query[Field.KEY], key[Field.KEY])
        revealed = draws < query[Field.ANNEALING_THRESHOLD]
        sees_clean = sees_clean | (query_clean & key_clean & revealed)
    sees_noisy = ~key_clean & same_block & (query[Field.STREAM] == key[Field.STREAM])
    same_document = (query[Field.DOCUMENT] == key[Field.DOCUMENT]) & (
        query[Field.DOCUMENT] != PADDING_DOCUMENT
    )
    return same_document & (sees_clean | sees_noisy)


def visible_counts(layout: Tensor) -> Tensor:
    """Number of keys that each token sees, by the sizes of blocks; [S] int64, 0 for padding.

    Args:
        layout: [4, S], [5, S] or, with annealed attention, which draws each pair, [6, S].
    """
    if len(layout) <= Field.ANNEALING_THRESHOLD:
        counted = _counts_by_block(platform.to_host(layout).numpy().astype(np.int64))
        return torch.from_numpy(counted).to(layout.device)
    real = layout[Field.DOCUMENT] != PADDING_DOCUMENT
    counts = torch.zeros(layout.shape[1], dtype=torch.int64, device=layout.device)
    if real.any():
        counts[real] = _counts_one_by_one(layout[:, real].long())
    return counts


def _counts_by_block(fields: np.ndarray) -> np.ndarray:
    # In NumPy: rows are short, and PyTorch takes three times as long to begin each step.
    document, block, stream = fields[[Field.DOCUMENT, Field.BLOCK, Field.STREAM]]
    num_blocks, num_streams = block.max(initial=0) + 1, stream.max(initial=0) + 1
    # One number a token, by document, block and stream: clean tokens precede noisy ones.
    numbered = (document * num_blocks + block) * num_streams + stream
    blocks, block_of, sizes = np.unique(numbered, return_inverse=True, return_counts=True)
    stream, block = blocks % num_streams, blocks // num_streams
    document = block // num_blocks
    clean = np.where(stream == CLEAN, sizes, 0)
    before = clean.cumsum() - clean  # clean tokens of earlier blocks, in all documents
    starts = np.ones(len(blocks), dtype=bool)
    starts[1:] = document[1:] != document[:-1]
    of_document = before[starts][starts.cumsum() - 1]  # those of earlier documents
    # A noisy block follows the clean one with its number, which it does not see.
    starts[1:] = block[1:] != block[:-1]
    number = starts.cumsum() - 1
    own = np.zeros_like(sizes)
    np.add.at(own, number, clean)
    seen = before - of_document - np.where(stream == CLEAN, 0, own[number]) + sizes
    counts: np.ndarray = np.where(document < 0, 0, seen)[block_of]
    return counts


def _counts_one_by_one(fields: Tensor, at_once: int = 256) -> Tensor:
    return torch.cat(
        [
            visible(queries[:, :, None], fields[:, None, :]).sum(1)
            for queries in fields.split(at_once, dim=1)
        ]
    )


def queries_and_keys(layout: Tensor, queries: int, keys: int) -> tuple[Tensor, Tensor]:
    """The layouts of the queries and of the keys of an attention.

    Args:
        layout: Of a row [4, S], whose tokens are queries and keys both; or of a rank's share of
            one (`context_parallel`), [4, R C + S]: the clean tokens of all ranks, then the share,
            whose first C tokens are among these.
        queries: S.
        keys: S, or R C + S - C.
    """
    if layout.shape[1] == queries:
        return layout, layout
    gathered, own = layout.split((layout.shape[1] - queries, queries), dim=1)
    return own, torch.cat((gathered, own[:, layout.shape[1] - keys :]), dim=1)


T = TypeVar("T")


class LayoutCache(Generic[T]):
    """Values derived from layout tensors, kept while their layouts are in use.

    A layout belongs to its micro-batch, and activation recomputation presents it again as another
    tensor object over the same storage. Entries are therefore found by storage address; each holds
    its layout, so an address cannot be reused while the entry lives. The oldest entries are
    dropped.
    """

    def __init__(self, derive: Callable[..., T], capacity: int = 16) -> None:
        self._derive = derive
        self._capacity = capacity
        self._entries: OrderedDict[tuple[Hashable, ...], tuple[Tensor, T]] = OrderedDict()

    def __call__(self, layout: Tensor, *further: Hashable) -> T:
        """The derived value of this layout, computed at most once while it is among the newest.

        Args:
            layout: First argument of the derivation.
            further: Its other ones.
        """
        key = (layout.data_ptr(), layout.shape[1], *further)
        if key not in self._entries:
            self._entries[key] = (layout, self._derive(layout, *further))
            if len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
        self._entries.move_to_end(key)
        return self._entries[key][1]

    def clear(self) -> None:
        """Keep none."""
        self._entries.clear()
