"""The text of a response while its tokens come: nothing is given out that may change or be cut."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"
"""What the bytes of a character decode to as long as some are missing."""


def first_stop(text: str, start: int, stops: Sequence[str]) -> tuple[int, int] | None:
    """Begin and end of the stop string that is complete first, from `start` on; None without one.

    Of several that end at the same character, the longest. That is where decoding character by
    character would have stopped, so it does not depend on the blocks that the text comes in.
    """
    found = ((text.find(stop, start), len(stop)) for stop in stops)
    ends = [(begin + length, begin) for begin, length in found if begin >= 0]
    if not ends:
        return None
    end, begin = min(ends)
    return begin, end


def possible_stop(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of the text that a stop string may begin with."""
    longest = max(map(len, stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        tail = text[len(text) - length :]
        if any(stop.startswith(tail) for stop in stops):
            return length
    return 0


class TextStream:
    """Turns tokens into text, up to the first stop string.

    The pieces that `push` and `finish` return, joined, are the text of all tokens, cut before the
    first stop string.

    Args:
        decode: Text of tokens.
        stops: Stop strings, none of them empty.

    Attributes:
        stopped: Whether a stop string came; no more tokens are needed.
        num_tokens: Tokens up to the one that completed the stop string, or all so far.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self.stopped = False
        self.num_tokens = 0
        self._decode = decode
        self._stops = tuple(stops)
        self._token_ids: list[int] = []
        self._given = 0
        # Only the tokens of a window are decoded anew: those that came after the first `_known`
        # ones, whose text is complete, and, as how a token is written may depend on the one
        # before, some of these from `_context` on.
        self._text = ""
        self._known = 0
        self._context = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; returns the text that is certain by now and was not returned before."""
        self._token_ids += token_ids
        new = self._new_text()
        stable = new.rstrip(INCOMPLETE)
        text = self._text + stable
        if stable and stable == new:
            self._text, self._context, self._known = text, self._known, len(self._token_ids)
        return self._more(text, final=False)

    def finish(self) -> str:
        """What was held back; no token follows."""
        return self._more(self._text + self._new_text(), final=True)

    def _new_text(self) -> str:
        """Text of the tokens that are not known yet."""
        window = self._token_ids[self._context :]
        known = self._decode(window[: self._known - self._context])
        return self._decode(window)[len(known) :]

    def _stable(self, count: int) -> str:
        """Text of the first tokens, without a character of which bytes are missing."""
        return self._decode(self._token_ids[:count]).rstrip(INCOMPLETE)

    def _more(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        self.num_tokens = len(self._token_ids)
        stop = first_stop(text, self._given, self._stops)
        if stop is not None:
            end, stop_end = stop
            self.stopped = True
            counts = range(len(self._token_ids))
            self.num_tokens = bisect_left(counts, stop_end, key=lambda n: len(self._stable(n)))
        else:
            end = len(text)
            if not final:
                end -= possible_stop(text[self._given :], self._stops)
        piece = text[self._given : end]
        self._given = max(self._given, end)
        return piece
