"""Rows of a token budget: complete, within the budget, full."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dlm.models.row_packing import RowPacking, best_fit_decreasing


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 50))
def test_every_text_is_in_one_row_with_room_for_it(lengths: list[int], budget: int) -> None:
    rows = best_fit_decreasing(lengths, budget)
    assert sorted(text for row in rows for text in row) == list(range(len(lengths)))
    assert rows == sorted(sorted(row) for row in rows)
    for row in rows:
        assert sum(lengths[text] for text in row) <= budget or sum(lengths[t] > 0 for t in row) == 1
    # No two rows would fit into one.
    sums = sorted(sum(lengths[text] for text in row) for row in rows)
    assert len(sums) < 2 or sums[0] + sums[1] > budget


@pytest.mark.parametrize("median", [300, 900, 2400])
def test_rows_of_mixed_lengths_are_full(median: int) -> None:
    """Log-normal lengths as of responses, 128 in all, in rows of 16k tokens."""
    generator = torch.Generator().manual_seed(median)
    lengths = torch.randn(128, generator=generator).mul(0.7).exp().mul(median).clamp(max=9000)
    texts = lengths.long().tolist()
    rows = best_fit_decreasing(texts, 16_384)
    assert len(rows) == math.ceil(sum(texts) / 16_384)  # the fewest that hold them
    full = sorted(sum(texts[i] for i in row) / 16_384 for row in rows)[1:]  # the rest in one
    assert sum(full) / len(full) >= 0.95


def test_without_a_budget_rows_are_in_order() -> None:
    assert RowPacking(2).rows([9, 1, 5]) == [[0, 1], [2]]
    assert RowPacking().rows([]) == [[]]
    assert RowPacking(max_tokens=8).rows([]) == [[]]
    assert RowPacking(max_tokens=8).rows([3, 9, 5]) == [[0, 2], [1]]
