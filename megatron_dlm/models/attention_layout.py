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
Sources: BD3-LM (Arriola et al. 2025) for the three-part mask; OPDLM section 3 for its use here;
DiffuLLaMA (Gong et al. 2025) for annealing, a Bernoulli draw for each pair.

S: tokens of a packed row. D: documents. L: longest document.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from megatron_dlm import platform

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


SHORT = 128
"""Tokens up to which a document is not worth a dense batch of its own size."""

DRAW_UNIT = 2**24
"""Upper bound of a pair's draw (exclusive); as a threshold it makes every pair visible."""


def block_ids(positions: Tensor, pattern: Pattern, block_size: int) -> Tensor:
    """Block id of each position under a single-stream pattern; same shape as `positions`."""
    if pattern == "causal":
        return positions
    if pattern == "full":
        return torch.zeros_like(positions)
    return positions // block_size


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


@dataclass(frozen=True)
class DocumentBatch:
    """Documents of a row, of similar lengths, seen as a padded batch.

    Attributes:
        gather: [D * L] int64, row index of each token of the padded batch (0 where padded).
        mask: [D, 1, L, L] bool, true where visible. Padded queries see themselves, so that no
            softmax is empty.
        num_documents: D.
        max_length: L.
    """

    gather: Tensor
    mask: Tensor
    num_documents: int
    max_length: int


@dataclass(frozen=True)
class DocumentBatches:
    """A packed row seen as padded batches of its documents, for dense attention kernels.

    Attributes:
        batches: Documents of a batch are longer than half the longest, or short; none in a row of
            padding.
        scatter: [S] int64, index into the batches laid end to end of each row token (0 for padding
            tokens).
        is_padding: [S, 1, 1] bool for the row's padding tokens, or None if it has none.
    """

    batches: Sequence[DocumentBatch]
    scatter: Tensor
    is_padding: Tensor | None


def document_batches(layout: Tensor) -> DocumentBatches:
    """Regroup a row by document; documents must be contiguous and numbered 0, 1, ... in the row.

    Attention costs less than four times the sum of squared lengths, instead of S^2; no pair of
    different documents is computed.
    """
    device = layout.device
    # On the host, which needs two of the numbers: one wait for the device, not one for each step.
    layout = platform.to_host(layout)
    document = layout[Field.DOCUMENT].long()
    real = document != PADDING_DOCUMENT
    lengths = torch.bincount(document[real])
    starts = lengths.cumsum(0) - lengths
    groups = _of_similar_length(lengths.tolist())
    places, shapes, end = [0] * len(lengths), [], 0
    for group, longest in groups:
        for number in group:
            places[number] = end
            end += longest
        shapes.append((len(group), longest))
    place = torch.tensor(places, dtype=torch.long)
    offset = torch.arange(len(document))
    scatter = torch.zeros_like(document)
    scatter[real] = place[document[real]] + offset[real] - starts[document[real]]
    gather = torch.zeros(end, dtype=torch.long)
    gather[scatter[real]] = offset[real]
    filled = torch.zeros(end, dtype=torch.bool)
    filled[scatter[real]] = True
    fields = layout[:, gather].clone()
    fields[Field.DOCUMENT][~filled] = PADDING_DOCUMENT
    fields = fields.to(device)
    gather, scatter = platform.to_device(gather, scatter)
    batches, start = [], 0
    for number, longest in shapes:
        part = slice(start, start + number * longest)
        own = fields[:, part].view(len(layout), number, longest)
        mask = visible(own[:, :, :, None], own[:, :, None, :])
        mask |= torch.eye(longest, dtype=torch.bool, device=device)
        batches.append(DocumentBatch(gather[part], mask[:, None], number, longest))
        start = part.stop
    return DocumentBatches(
        batches=batches,
        scatter=scatter,
        is_padding=None if bool(real.all()) else ~real[:, None, None].to(device),
    )


def _of_similar_length(lengths: Sequence[int]) -> list[tuple[list[int], int]]:
    """Documents grouped so that none is at most half as long as the longest; with that length.

    Short ones stay together: another kernel would cost more than padding them.
    """
    groups: list[tuple[list[int], int]] = []
    for document in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not groups or 2 * max(lengths[document], SHORT) <= groups[-1][1]:
            groups.append(([], lengths[document]))
        groups[-1][0].append(document)
    return [(sorted(group), longest) for group, longest in groups if longest]


T = TypeVar("T")


class LayoutCache(Generic[T]):
    """Values derived from layout tensors, kept while their layouts are in use.

    A layout belongs to its micro-batch, and activation recomputation presents it again as another
    tensor object over the same storage. Entries are therefore found by storage address; each holds
    its layout, so an address cannot be reused while the entry lives. The oldest entries are
    dropped.
    """

    def __init__(self, derive: Callable[[Tensor], T], capacity: int = 16) -> None:
        self._derive = derive
        self._capacity = capacity
        self._entries: OrderedDict[tuple[int, int], tuple[Tensor, T]] = OrderedDict()

    def __call__(self, layout: Tensor) -> T:
        """The derived value of this layout, computed at most once while it is among the newest."""
        key = (layout.data_ptr(), layout.shape[1])
        if key not in self._entries:
            self._entries[key] = (layout, self._derive(layout))
            if len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
        self._entries.move_to_end(key)
        return self._entries[key][1]
