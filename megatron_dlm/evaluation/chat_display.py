"""An answer on the screen while it is decoded.

In a pipe, the text of each block follows when the block is finished. On a terminal, the block in
decoding is drawn again after every forward: tokens appear where MASK was; what is finished stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from io import StringIO

from rich.console import Console
from rich.text import Text

from megatron_dlm.evaluation.chat_session import Decoding
from megatron_dlm.evaluation.text_stream import INCOMPLETE, TextStream

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
_MASK, _MASK_ASCII = "\u2591", "_"


def printable(text: str) -> str:
    """A model's text without what would steer the terminal; lines stay, tabs become spaces."""
    return _CONTROL.sub(lambda found: "    " if found[0] == "\t" else "\ufffd", text)


class BlockByBlock:
    """Text of an answer for a pipe: each piece is final.

    Args:
        text_of: Text of tokens.
    """

    def __init__(self, text_of: Callable[[list[int]], str]) -> None:
        self._stream = TextStream(text_of)

    def show(self, state: Decoding) -> str:
        """The text that was finished by the last forward."""
        return self._stream.push(state.finished[self._stream.num_tokens :])

    def end(self, token_ids: list[int]) -> str:
        """The rest of an answer that ends here."""
        last = self._stream.push(token_ids[self._stream.num_tokens :])
        return last + self._stream.finish() + "\n"


class SettlingTokens:
    """What to write to a terminal so that it shows an answer in decoding.

    Args:
        text_of: Text of tokens.
        texts_of: Text of each token, of special ones too.
        columns: Of the terminal.
        rows: Of the terminal.
        ascii_only: Whether the terminal has no other characters.
    """

    def __init__(
        self,
        text_of: Callable[[list[int]], str],
        texts_of: Callable[[Sequence[int]], list[str]],
        *,
        columns: int,
        rows: int,
        ascii_only: bool = False,
    ) -> None:
        self._text_of, self._texts_of = text_of, texts_of
        self._width = max(columns - 1, 10)  # the last column would wrap by itself
        self._rows = max(rows - 1, 2)
        self._mask = _MASK_ASCII if ascii_only else _MASK
        self._console = Console(file=StringIO(), force_terminal=True, width=self._width)
        self._offset = 0  # characters in lines of the answer that are complete
        self._final = 0  # rows of the current line that stay
        self._drawn = 0  # rows that the next drawing replaces
        self._before: tuple[int, list[int | None]] = (-1, [])

    def show(self, state: Decoding) -> str:
        """Draw the state after a forward over the one before."""
        finished = printable(self._text_of(state.finished).rstrip(INCOMPLETE))
        block = self._block(state)
        self._before = len(state.finished), state.block
        return self._erase() + self._rows_that_stay(finished) + self._draw(finished, block)

    def end(self, token_ids: list[int]) -> str:
        """Draw the whole answer, which ends here."""
        text = printable(self._text_of(token_ids))
        rows = self._erase() + self._rows_that_stay(text)
        last = self._wrapped(Text(text[self._offset :]))[self._final :]
        return rows + "\n".join(self._styled(row) for row in last) + "\n"

    def _block(self, state: Decoding) -> Text:
        length, before = self._before
        known = before if length == len(state.finished) else [None] * len(state.block)
        settled = [token for token in state.block if token is not None]
        texts = iter(self._texts_of(settled))
        special = iter([not self._text_of([token]) for token in settled])
        block = Text()
        for token, earlier in zip(state.block, known, strict=True):
            if token is None:
                block.append(self._mask, "dim")
            else:
                style = "dim" if next(special) else "bold" if earlier is None else ""
                block.append(printable(next(texts)).replace("\n", " "), style)
        return block

    def _erase(self) -> str:
        up = f"\x1b[{self._drawn - 1}A" if self._drawn > 1 else ""
        return f"\r{up}\x1b[J" if self._drawn else ""

    def _rows_that_stay(self, finished: str) -> str:
        """Rows that no later text changes: all but the last of the answer's last line."""
        rows: list[Text] = []
        while True:
            line, newline, _ = finished[self._offset :].partition("\n")
            wrapped = self._wrapped(Text(line))
            stay = wrapped if newline else wrapped[:-1]
            rows += stay[self._final :]
            if not newline:
                self._final = max(self._final, len(stay))
                return "".join(self._styled(row) + "\n" for row in rows)
            self._offset += len(line) + 1
            self._final = 0

    def _draw(self, finished: str, block: Text) -> str:
        line = Text(finished[self._offset :]) + block
        rows = self._wrapped(line)[self._final :]
        if len(rows) > self._rows:
            rows = [*rows[: self._rows - 1], Text("...", "dim")]
        self._drawn = len(rows)
        return "\n".join(self._styled(row) for row in rows)

    def _wrapped(self, line: Text) -> list[Text]:
        return list(line.wrap(self._console, self._width)) or [Text()]

    def _styled(self, row: Text) -> str:
        with self._console.capture() as capture:
            self._console.print(row, end="", soft_wrap=True, highlight=False)
        return capture.get()
