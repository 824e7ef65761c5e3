"""The sampler is a pure function of (seed, sample index) that visits every record each epoch."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.data.sampler import ShuffledSampler
from megatron_dlm.errors import UserError


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(0, 2**40), st.integers(0, 5))
def test_every_epoch_has_every_record_once(num_records: int, seed: int, epoch: int) -> None:
    samples = ShuffledSampler(num_records, seed).samples(epoch * num_records, num_records)
    assert sorted(record for _, record in samples) == list(range(num_records))


@settings(deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_resume_anywhere_continues_the_run(num_records: int, batch_sizes: list[int]) -> None:
    """Batches of any size, each from a new sampler, make up one uninterrupted run."""
    whole = ShuffledSampler(num_records, 3).samples(0, sum(batch_sizes))
    assert [g for g, _ in whole] == list(range(sum(batch_sizes)))
    resumed, consumed = [], 0
    for size in batch_sizes:
        resumed += ShuffledSampler(num_records, 3).samples(consumed, size)
        consumed += size
    assert resumed == whole


def test_access_order_does_not_matter() -> None:
    sampler = ShuffledSampler(10, 0)
    forward = [sampler.record_index(g) for g in range(40)]
    assert [sampler.record_index(g) for g in reversed(range(40))] == forward[::-1]


def test_epochs_and_seeds_differ() -> None:
    first, second, other = (
        [record for _, record in ShuffledSampler(100, seed).samples(start, 100)]
        for seed, start in [(1, 0), (1, 100), (2, 0)]
    )
    assert first != second
    assert first != other
    assert first != list(range(100))


def test_order_is_the_same_on_every_machine() -> None:
    assert [record for _, record in ShuffledSampler(8, 1234).samples(0, 16)] == GOLDEN


GOLDEN = [1, 6, 2, 0, 3, 5, 7, 4, 3, 6, 7, 0, 5, 4, 1, 2]


def test_without_shuffling_the_file_order_repeats() -> None:
    sampler = ShuffledSampler(3, 0, shuffle=False)
    assert [record for _, record in sampler.samples(2, 5)] == [2, 0, 1, 2, 0]
    assert [sampler.epoch(g) for g in (0, 2, 3, 6)] == [0, 0, 1, 2]


@pytest.mark.parametrize(("num_records", "seed"), [(0, 0), (5, -1)])
def test_refused(num_records: int, seed: int) -> None:
    with pytest.raises(UserError):
        ShuffledSampler(num_records, seed)
