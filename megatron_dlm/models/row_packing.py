"""How texts of different lengths are laid into rows: a number of texts, or a budget of tokens."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from megatron_dlm.config import Config
from megatron_dlm.models.forward import most_rows


@dataclass(frozen=True)
class RowPacking:
    """The rule by which student, teacher and validation lay texts into rows.

    Attributes:
        texts: Texts of a row, where there is no budget (`--micro-batch-size`).
        max_tokens: Budget of a row, before padding (`--max-tokens-per-micro-batch`), or None.
    """

    texts: int = 1
    max_tokens: int | None = None

    @classmethod
    def of(cls, config: Config) -> Self:
        """The rule that the options name."""
        training = config.training
        return cls(training.micro_batch_size, training.max_tokens_per_micro_batch)

    def rows(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of the texts of each row, ascending; at least one row, empty without texts."""
        if self.max_tokens is not None:
            return best_fit_decreasing(lengths, self.max_tokens) or [[]]
        starts = range(0, len(lengths), self.texts)
        return [list(range(i, min(i + self.texts, len(lengths)))) for i in starts] or [[]]

    def agreed(self, rows: int) -> int:
        """The number of rows that every replica of the model runs, where that has to be the same.

        Under a budget the rank with the most decides, and all call this; else all have the same
        number anyway.
        """
        return rows if self.max_tokens is None else most_rows(rows)


def best_fit_decreasing(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Pack texts into rows: the longest first, each into the fullest row with room for it.

    Uses at most 11/9 of the fewest possible rows, plus 6/9 (Johnson 1974). Depends on nothing but
    the lengths, so all ranks of a replica find the same rows.

    Args:
        lengths: Tokens of each text.
        max_tokens: Limit of a row; a longer text gets a row of its own.

    Returns:
        Indices of the texts of each row, ascending; rows in the order of their first text.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for text in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        found = bisect_left(room, (lengths[text], -1))
        if found < len(room):
            free, row = room.pop(found)
            rows[row].append(text)
        else:
            free, row = max_tokens, len(rows)
            rows.append([text])
        insort(room, (max(0, free - lengths[text]), row))
    return sorted(sorted(row) for row in rows)


def texts_of_rows(lengths: Sequence[int], max_tokens: int) -> list[slice]:
    """Group texts into rows, in order, as many to a row as fit.

    Args:
        lengths: Tokens of each text.
        max_tokens: Limit of a row; a longer text gets a row of its own.

    Returns:
        Indices of the texts of each row; one empty row if there is no text.
    """
    rows, first, tokens = [], 0, 0
    for text, length in enumerate(lengths):
        if tokens and tokens + length > max_tokens:
            rows.append(slice(first, text))
            first, tokens = text, 0
        tokens += length
    return [*rows, slice(first, len(lengths))]
