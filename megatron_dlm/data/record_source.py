"""Records of data, wherever they are stored: counted, named in errors, and read one at a time."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Record = dict[str, Any]


class RecordSource(ABC):
    """N records that stay where they are stored until one is asked for.

    Attributes:
        path: What the user named.
    """

    path: str

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of the content; a resumed run can tell that its data changed."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def where(self, index: int) -> str:
        """Return the place of a record, for error messages: ``file:line`` or ``file: row 3``."""

    @abstractmethod
    def record(self, index: int) -> Record:
        """Read one record.

        Raises:
            UserError: It is no object, or cannot be read.
        """

    def records(self) -> Iterator[tuple[str, Record]]:
        """Iterate over (place, record)."""
        for index in range(len(self)):
            yield self.where(index), self.record(index)

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> "RecordSource":
        """Return some of the records; they keep their places in error messages."""
        return SelectedRecords(self, indices)

    def first(self, count: int) -> "RecordSource":
        """Return the first `count` records; all, if there are fewer."""
        return self if count >= len(self) else self.select(range(count))


class SelectedRecords(RecordSource):
    """Some records of others, in any order; one may be there several times."""

    def __init__(self, records: RecordSource, indices: Sequence[int] | NDArray[np.int64]) -> None:
        """Select by index."""
        self.path = records.path
        self._records = records
        self._indices = np.asarray(indices, dtype=np.int64)

    @property
    def fingerprint(self) -> str:
        """Of all records that these are chosen from."""
        return self._records.fingerprint

    def __len__(self) -> int:
        return len(self._indices)

    def where(self, index: int) -> str:
        """Return the place of a record."""
        return self._records.where(int(self._indices[index]))

    def record(self, index: int) -> Record:
        """Read one record."""
        return self._records.record(int(self._indices[index]))


class KnownRecords(RecordSource):
    """Records whose fingerprint is known already, which may take long to compute."""

    def __init__(self, records: RecordSource, fingerprint: str) -> None:
        """Add what another process has found."""
        self.path = records.path
        self._records = records
        self._fingerprint = fingerprint

    @property
    def fingerprint(self) -> str:
        """Return what was given."""
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._records)

    def where(self, index: int) -> str:
        """Return the place of a record."""
        return self._records.where(index)

    def record(self, index: int) -> Record:
        """Read one record."""
        return self._records.record(index)
