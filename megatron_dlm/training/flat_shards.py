"""Shards of flattened parameters as boxes of the whole tensor, so that no rank gathers others'.

Megatron's distributed optimizer lays the parameters of a bucket end to end and gives each
data-parallel rank an equal piece of the line. Such a piece starts and ends anywhere in a parameter.
A distributed checkpoint stores boxes: offset and size along each axis. A piece of a matrix is at
most three of them (the rest of a row, whole rows, the beginning of a row), so each rank writes and
reads its own piece, under the same names and shapes as if the parameter were stored whole.
"""

import dataclasses
import math
from collections.abc import Sequence

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes along the axes."""


def boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The boxes that elements start to stop - 1 of a row-major tensor fill, in their order.

    Args:
        shape: Of the tensor, n axes.
        start: First element, counted in the flattened tensor.
        stop: One past the last one.

    Returns:
        At most 2n - 1 boxes; none if there are no elements.
    """
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [((start,), (stop - start,))] if shape else [((), ())]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows

    def within(i: int, begin: int, end: int) -> list[Box]:
        return [((i, *o), (1, *s)) for o, s in boxes(shape[1:], begin - i * row, end - i * row)]

    if first > last:
        return within(last, start, stop)
    whole = [((first, *[0] * (len(shape) - 1)), (last - first, *shape[1:]))]
    return [
        *within(first - 1, start, first * row),
        *(whole if first < last else []),
        *within(last, last * row, stop),
    ]


def flat_shards(
    parameter: ShardedTensor | ShardedTensorFactory, start: int, values: dict[str, Tensor]
) -> dict[str, ShardedTensor]:
    """Describe what a rank holds for a piece of a flattened parameter.

    Args:
        parameter: The whole parameter of this rank in the model's sharded state, with its data.
        start: Where the piece starts in the flattened parameter.
        values: Tensors of the piece, [elements], by the prefix of their names in the checkpoint.

    Returns:
        Views of the values, by any unique names. As the ranks of a data-parallel group hold
        different pieces, none is a copy of another along that axis.

    Raises:
        ValueError: The parameter is stored in another order of elements than it is held in.
    """
    parts = [parameter]
    if isinstance(parameter, ShardedTensorFactory):
        parts = list(nested_values(parameter.build()))
    *replica, _ = parameter.replica_id
    found: dict[str, ShardedTensor] = {}
    for part in parts:
        begin = _position(part, parameter.data)
        leading = part.prepend_axis_num
        for prefix, flat in values.items():
            own = slice(max(start, begin), min(start + len(flat), begin + part.data.numel()))
            position = own.start - start
            for offset, size in boxes(part.local_shape, own.start - begin, own.stop - begin):
                count = math.prod(size)
                shape = (*[1] * leading, *size)
                offsets = (
                    *part.global_offset[:leading],
                    *(a + b for a, b in zip(part.global_offset[leading:], offset, strict=True)),
                )
                found[f"{prefix}.{len(found)}"] = dataclasses.replace(
                    part,
                    key=f"{prefix}.{part.key}",
                    data=flat[position : position + count].view(shape),
                    dtype=flat.dtype,
                    local_shape=shape,
                    global_offset=offsets,
                    axis_fragmentations=None,
                    replica_id=(*replica, 0),
                    prepend_axis_num=0,
                )
                position += count
    return found


def _position(part: ShardedTensor, whole: Tensor) -> int:
    """Where a part of a parameter starts in it, in elements."""
    data = part.data
    is_view = data.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    if not (is_view and data.is_contiguous() and whole.is_contiguous()):
        raise ValueError(f"{part.key} is stored in another order of elements than it is held in")
    return data.storage_offset() - whole.storage_offset()
