"""Several sources of records as one."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from megatron_dlm.data.record_source import Record, RecordSource


class JoinedRecords(RecordSource):
    """The records of several sources, one source after the other."""

    def __init__(
        self, parts: Sequence[RecordSource], path: str, choices: Sequence[Any] = ()
    ) -> None:
        """Join sources.

        Args:
            parts: The sources, in their order.
            path: What the user named.
            choices: What else decides which records there are, for the fingerprint; of JSON types.
        """
        self.path = path
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self._choices = list(choices)

    @cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the sources' and of the choices."""
        content = [[part.fingerprint for part in self._parts], self._choices]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def where(self, index: int) -> str:
        """Return the place of a record in its source."""
        part, index = self._find(index)
        return part.where(index)

    def record(self, index: int) -> Record:
        """Read one record."""
        part, index = self._find(index)
        return part.record(index)

    def _find(self, index: int) -> tuple[RecordSource, int]:
        index = range(len(self))[index]
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part], index - (int(self._ends[part - 1]) if part else 0)
