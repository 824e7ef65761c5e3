"""The record of the g-th sample of a run, as a pure function, so that resuming costs nothing.

A run counts the samples it has consumed, over all ranks and epochs. This count is the whole state
of the data pipeline: it is saved in checkpoints, and it keys the random draws of a sample.
"""

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.errors import bad_value


def shuffled_order(num_records: int, seed: int, *key: int) -> NDArray[np.int64]:
    """A permutation of `num_records` that depends only on seed and key (each at least 0).

    Sorting raw generator output instead of Generator.permutation: numpy keeps the former stable
    between versions, not the latter.
    """
    keys = np.random.Philox(np.random.SeedSequence([seed, *key])).random_raw(num_records)
    return np.argsort(keys, kind="stable")


class ShuffledSampler:
    """Endless epochs over N records, each in its own seeded order.

    Sample g is record ``order(seed, g // N)[g % N]``: every record once per epoch, at any batch
    size and for any number of ranks.
    """

    def __init__(self, num_records: int, seed: int, shuffle: bool = True) -> None:
        """Set up the sampler.

        Args:
            num_records: N, at least 1.
            seed: Decides the orders; at least 0.
            shuffle: False keeps the order of the file in every epoch.

        Raises:
            UserError: There are no records, or the seed is negative.
        """
        if num_records < 1:
            raise bad_value("num_records", num_records, "nothing to sample", "provide data")
        if seed < 0:
            raise bad_value("--seed", seed, "is negative", "choose 0 or more")
        self.num_records = num_records
        self.seed = seed
        self.shuffle = shuffle
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def epoch(self, sample_index: int) -> int:
        """Return the epoch, from 0, that a sample belongs to."""
        return sample_index // self.num_records

    def record_index(self, sample_index: int) -> int:
        """Return the record of global sample `sample_index` (from 0)."""
        if sample_index < 0:
            raise ValueError(f"sample_index = {sample_index} is negative")
        epoch, position = divmod(sample_index, self.num_records)
        if not self.shuffle:
            return position
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = shuffled_order(self.num_records, self.seed, epoch)
        return int(self._order[position])

    def samples(self, start: int, count: int) -> list[tuple[int, int]]:
        """Return (sample_index, record index) of the `count` samples from `start` on."""
        return [(g, self.record_index(g)) for g in range(start, start + count)]
