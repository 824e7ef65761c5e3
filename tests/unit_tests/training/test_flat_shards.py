"""Pieces of a flattened parameter, as boxes of the whole tensor."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_dlm.training.flat_shards import boxes, flat_shards


@st.composite
def pieces(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=0, max_size=4)))
    ends = sorted(draw(st.tuples(*[st.integers(0, math.prod(shape))] * 2)))
    return shape, ends[0], ends[1]


@given(pieces())
def test_boxes_hold_the_elements_in_their_order(
    piece: tuple[tuple[int, ...], int, int],
) -> None:
    shape, start, stop = piece
    whole = torch.arange(math.prod(shape)).view(shape)
    found = boxes(shape, start, stop)
    assert len(found) <= max(1, 2 * len(shape) - 1)
    elements = [
        element
        for offset, size in found
        for element in whole[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
        .flatten()
        .tolist()
    ]
    assert elements == list(range(start, stop))


@given(st.integers(0, 24), st.integers(0, 24))
def test_values_lie_where_the_whole_tensor_has_them(a: int, b: int) -> None:
    """A parameter of rows 4 to 7 of [2, 8, 6] in the second place of a stacked axis."""
    start, stop = min(a, b), max(a, b)
    parameter = torch.arange(24).view(4, 6)
    described = ShardedTensor.from_rank_offsets(
        "weight", parameter, (0, 1, 2), (1, 1, 2), replica_id=(0, 1, 5), prepend_axis_num=1
    )
    values = {"moment": parameter.flatten()[start:stop].float() * 0.5}
    filled = torch.full((2, 8, 6), torch.nan)
    for shard in flat_shards(described, start, values).values():
        assert shard.key == "moment.weight"
        assert shard.global_shape == (2, 8, 6)
        assert shard.replica_id == (0, 1, 0)
        place = tuple(
            slice(offset, offset + size)
            for offset, size in zip(shard.global_offset, shard.local_shape, strict=True)
        )
        assert shard.data is not None
        assert filled[place].isnan().all()
        filled[place] = shard.data
    expected = torch.full((24,), torch.nan)
    expected[start:stop] = torch.arange(start, stop) * 0.5
    assert torch.equal(filled[1, 4:].flatten().nan_to_num(-1), expected.nan_to_num(-1))
    assert filled[0].isnan().all()
    assert filled[1, :4].isnan().all()


def test_another_order_of_elements_is_refused() -> None:
    parameter = torch.arange(6).view(2, 3)
    described = ShardedTensor.from_rank_offsets("weight", parameter.t(), replica_id=(0, 0, 0))
    with pytest.raises(ValueError, match="weight is stored in another order"):
        flat_shards(described, 0, {"moment": torch.zeros(6)})
