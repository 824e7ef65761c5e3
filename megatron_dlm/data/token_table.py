"""Token sequences of different lengths, in memory or in files that are mapped into it."""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class TokenSequences(Protocol):
    """N token sequences."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor:
        """Return sequence `index` as a new int64 tensor."""

    def length(self, index: int) -> int:
        """Tokens of sequence `index`."""

    def fingerprint(self, indices: Iterable[int] | None = None) -> str:
        """SHA-256 of some sequences, by default of all.

        Raises:
            IndexError: There is no such sequence.
        """


class TokenTable:
    """N token sequences in one flat array, which grows."""

    def __init__(self) -> None:
        """Start without sequences."""
        self._tokens = array("i")
        self._ends = array("q", [0])

    def append(self, token_ids: Sequence[int]) -> None:
        """Add a sequence."""
        self._tokens.extend(token_ids)
        self._ends.append(len(self._tokens))

    @property
    def tokens(self) -> NDArray[np.int32]:
        """The token ids of all sequences, [T]."""
        return np.array(self._tokens, dtype=np.int32)

    @property
    def ends(self) -> NDArray[np.int64]:
        """Where in `tokens` each sequence ends, after a zero: [N + 1]."""
        return np.array(self._ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def length(self, index: int) -> int:
        """See `TokenSequences`."""
        return self._ends[index + 1] - self._ends[index]

    def fingerprint(self, indices: Iterable[int] | None = None) -> str:
        """See `TokenSequences`."""
        return _fingerprint(self, self._at, indices)

    def __getitem__(self, index: int) -> Tensor:
        """See `TokenSequences`."""
        return torch.from_numpy(np.array(self._at(index), dtype=np.int64))

    def _at(self, index: int) -> "array[int]":
        return self._tokens[self._ends[index] : self._ends[index + 1]]


class MappedTokens:
    """N token sequences of several parts, each stored in a file and read when it is asked for."""

    def __init__(self, parts: Sequence[tuple[Any, NDArray[np.int64]]]) -> None:
        """Join parts.

        Args:
            parts: Of each, its token ids [T], which can be sliced without being read whole, and
                where its sequences end, [N + 1] as in `TokenTable`.
        """
        self._tokens = [tokens for tokens, _ in parts]
        self._ends = [ends for _, ends in parts]
        self._before = np.cumsum([0, *(len(ends) - 1 for ends in self._ends)])

    def __len__(self) -> int:
        return int(self._before[-1])

    def length(self, index: int) -> int:
        """See `TokenSequences`."""
        _, start, end = self._find(index)
        return end - start

    def fingerprint(self, indices: Iterable[int] | None = None) -> str:
        """See `TokenSequences`."""
        return _fingerprint(self, self._at, indices)

    def __getitem__(self, index: int) -> Tensor:
        """See `TokenSequences`."""
        return torch.from_numpy(self._at(index).astype(np.int64))

    def _at(self, index: int) -> NDArray[np.int32]:
        part, start, end = self._find(index)
        return np.asarray(self._tokens[part][start:end])

    def _find(self, index: int) -> tuple[int, int, int]:
        """Part, first token in it and the one after the last."""
        index = range(len(self))[index]
        part = int(np.searchsorted(self._before, index, side="right")) - 1
        ends, at = self._ends[part], index - int(self._before[part])
        return part, int(ends[at]), int(ends[at + 1])


def _fingerprint(table: TokenSequences, at: Any, indices: Iterable[int] | None) -> str:
    digest = hashlib.sha256()
    for index in range(len(table)) if indices is None else indices:
        digest.update(table.length(index).to_bytes(8, "little"))
        digest.update(at(index))
    return digest.hexdigest()
