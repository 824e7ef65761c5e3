"""Shares of an update against a brute force."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dlm.training.shares import share_by_cost


@given(st.lists(st.integers(0, 50), max_size=7), st.integers(1, 3))
def test_shares_are_near_the_best(costs: list[int], ranks: int) -> None:
    owner = share_by_cost(costs, ranks)

    def dearest(owner: tuple[int, ...] | list[int]) -> int:
        loads = [0] * ranks
        for cost, rank in zip(costs, owner, strict=True):
            loads[rank] += cost
        return max(loads)

    best = min(map(dearest, itertools.product(range(ranks), repeat=len(costs))))
    assert dearest(owner) <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_skewed_update_is_shared_evenly(ranks: int) -> None:
    """Log-normal lengths, 16 a rank, with costs that grow faster than lengths."""
    generator = torch.Generator().manual_seed(ranks)
    lengths = torch.randn(16 * ranks, generator=generator).mul(1.0).exp().mul(600).clamp(max=8000)
    costs = (lengths + lengths.square() / 8000).tolist()
    shared = [0.0] * ranks
    for cost, rank in zip(costs, share_by_cost(costs, ranks), strict=True):
        shared[rank] += cost
    by_index = [sum(costs[rank::ranks]) for rank in range(ranks)]
    mean = sum(costs) / ranks
    assert max(shared) / mean < 1.02
    assert max(by_index) / mean > 1.2
