"""What a terminal shows of an answer in decoding, by a terminal of our own."""

import re
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from megatron_dlm.evaluation.chat_display import BlockByBlock, SettlingTokens
from megatron_dlm.evaluation.chat_session import Decoding

COLUMNS, ROWS = 24, 12
WORDS = [
    "a",
    " the",
    " longer",
    "\n",
    "\n\n",
    " ",
    "漢",
    "é",
    "\x1b[2J",
    "\t",
    "supercalifragilistic",
]
END = len(WORDS)
MASK = "\u2591"


def text_of(token_ids: Sequence[int]) -> str:
    return "".join(WORDS[token_id] for token_id in token_ids if token_id != END)


def texts_of(token_ids: Sequence[int]) -> list[str]:
    return ["<end>" if token_id == END else WORDS[token_id] for token_id in token_ids]


class Screen:
    """Rows of text, and what moves the cursor: line feed, carriage return, up, erase below."""

    def __init__(self) -> None:
        self.rows = [""]
        self._row = 0

    def write(self, text: str) -> None:
        for part in re.findall(r"\x1b\[\d*[A-Za-z]|\x1b\[[\d;]*m|\n|\r|[^\x1b\n\r]+|\x1b", text):
            if part == "\n":
                self._row += 1
                self.rows += [""] * (self._row == len(self.rows))
            elif part == "\r":
                self._returned = True
            elif part.endswith("A") and part.startswith("\x1b["):
                self._row -= int(part[2:-1])
                assert self._row >= 0
            elif part == "\x1b[J":
                assert self._returned
                self.rows[self._row :] = [""]
            elif not part.endswith("m"):
                assert part != "\x1b", "the model's escape reached the terminal"
                self._returned = False
                self.rows[self._row] += part
                assert cell_len(self.rows[self._row]) < COLUMNS


BLOCKS = st.lists(
    st.lists(st.tuples(st.integers(0, END - 1), st.integers(1, 4)), min_size=4, max_size=4),
    min_size=1,
    max_size=6,
)


def states(blocks: list[list[tuple[int, int]]]) -> list[Decoding]:
    """The state after each forward; a block's tokens are settled by steps."""
    found: list[Decoding] = []
    finished: list[int] = []
    for block in blocks:
        for step in range(1, max(step for _, step in block)):
            shown = [token if own <= step else None for token, own in block]
            found.append(Decoding(list(finished), shown))
        finished += [token for token, _ in block]
        found.append(Decoding(list(finished), [None] * 4))
    return found[:-1]  # the last forward ends the response


def without_space(text: str) -> str:
    return re.sub(r"\s", "", text)


@given(BLOCKS)
def test_the_screen_shows_each_state_and_keeps_the_answer(
    blocks: list[list[tuple[int, int]]],
) -> None:
    screen, stay = Screen(), ""
    display = SettlingTokens(text_of, texts_of, columns=COLUMNS, rows=ROWS)
    for state in states(blocks):
        screen.write(display.show(state))
        shown = "\n".join(screen.rows)
        assert shown.count(MASK) == state.block.count(None)
        tokens = "".join(MASK if t is None else WORDS[t] for t in state.block)
        expected = (text_of(state.finished) + tokens).replace("\x1b", "\ufffd")
        assert without_space(shown) == without_space(expected)
        # Rows before the last line of finished text are never drawn again.
        assert shown.startswith(stay)
        stay = "".join(f"{row}\n" for row in screen.rows[: text_of(state.finished).count("\n")])
    answer = [token for block in blocks for token, _ in block]
    screen.write(display.end(answer))
    assert MASK not in "\n".join(screen.rows)
    expected = text_of(answer).replace("\x1b", "\ufffd")
    assert without_space("\n".join(screen.rows)) == without_space(expected)
    assert screen.rows[-1] == ""
    piped = BlockByBlock(text_of)
    pieces = [piped.show(state) for state in states(blocks)] + [piped.end(answer)]
    assert "".join(pieces) == text_of(answer) + "\n"


def test_what_follows_the_end_is_taken_away() -> None:
    screen, display = Screen(), SettlingTokens(text_of, texts_of, columns=COLUMNS, rows=ROWS)
    screen.write(display.show(Decoding([0], [1, END, None, END])))
    assert screen.rows == [f"a the<end>{MASK}<end>"]
    screen.write(display.end([0, 1, END]))
    assert screen.rows == ["a the", ""]


def test_an_answer_that_is_decoded_as_a_whole_stays_within_the_terminal() -> None:
    screen, display = Screen(), SettlingTokens(text_of, texts_of, columns=COLUMNS, rows=5)
    for settled in (0, 300):
        block = [0] * settled + [None] * (400 - settled)
        screen.write(display.show(Decoding([], block)))
        assert (len(screen.rows), screen.rows[-1]) == (4, "...")
    screen.write(display.end([0] * 400))
    assert "".join(screen.rows) == "a" * 400


def test_half_a_character_waits() -> None:
    def decode(token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode(errors="replace")

    display = BlockByBlock(decode)
    text = "né漢!".encode()
    pieces = [display.show(Decoding(list(text[:n]), [])) for n in range(1, len(text))]
    assert pieces == ["n", "", "é", "", "", "漢"]
    assert display.end(list(text)) == "!\n"
