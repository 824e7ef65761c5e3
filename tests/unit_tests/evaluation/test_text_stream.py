"""Text is given out as early as it is certain, and never what a stop string cuts."""

import codecs
from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from megatron_dlm.evaluation.text_stream import TextStream

# Characters of one to four bytes; few of them, so that stop strings occur.
TEXTS = st.text("ab€😀", max_size=12).map(str.encode)
ANY_BYTES = st.lists(st.sampled_from([b"a", b"b", b"\xe2", b"\x82", b"\xac", b"\xff"])).map(
    b"".join
)
STOPS = st.lists(st.text("ab€😀", min_size=1, max_size=4), max_size=3)
CUTS = st.lists(st.integers(0, 40), max_size=12)


def decode(token_ids: list[int]) -> str:
    """A token is a byte."""
    return bytes(token_ids).decode(errors="replace")


def parts(content: bytes, cuts: list[int]) -> list[bytes]:
    """The content cut at some places; some parts may be empty."""
    edges = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    return [content[a:b] for a, b in pairwise(edges)]


def stopped_text(text: str, stops: list[str]) -> str | None:
    """The text before the stop string that is complete first, character by character."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)]
    return None


@given(TEXTS | ANY_BYTES, STOPS, CUTS)
@example("ab€".encode(), ["b€", "€"], [1, 3, 4])
@example(b"aab", ["aab", "ab"], [1, 2])
def test_pieces_are_the_text_before_the_first_stop(
    content: bytes, stops: list[str], cuts: list[int]
) -> None:
    stream = TextStream(decode, stops)
    incremental = codecs.getincrementaldecoder("utf-8")("replace")
    pieces, known = [], ""
    for part in parts(content, cuts):
        pieces.append(stream.push(part))
        known += incremental.decode(part)
        if not stream.stopped:
            late = len(known.rstrip("\ufffd")) - len("".join(pieces))
            assert late <= max((len(stop) - 1 for stop in stops), default=0)
    pieces.append(stream.finish())
    whole = content.decode(errors="replace")
    expected = stopped_text(whole, stops)
    assert stream.stopped == (expected is not None)
    assert "".join(pieces) == (whole if expected is None else expected)


@given(TEXTS, STOPS, CUTS)
def test_tokens_count_up_to_the_one_that_completes_the_stop(
    content: bytes, stops: list[str], cuts: list[int]
) -> None:
    stream = TextStream(decode, stops)
    for part in parts(content, cuts):
        stream.push(part)
    stream.finish()
    incremental = codecs.getincrementaldecoder("utf-8")()
    text = ""
    for count in range(1, len(content) + 1):
        text += incremental.decode(content[count - 1 : count])
        if stopped_text(text, stops) is not None:
            break
    else:
        count = len(content)
    assert stream.num_tokens == count


@given(st.lists(st.integers(0, 3), max_size=12), CUTS)
def test_a_token_may_be_written_as_the_one_before_it_has_it(
    token_ids: list[int], cuts: list[int]
) -> None:
    """A tokenizer of words, which writes spaces between them, and one that it leaves out."""

    def words(token_ids: list[int]) -> str:
        return " ".join(f"w{token_id}" for token_id in token_ids if token_id)

    stream = TextStream(words)
    pieces = [stream.push(list(part)) for part in parts(bytes(token_ids), cuts)]
    assert "".join([*pieces, stream.finish()]) == words(token_ids)


def test_a_block_costs_the_same_at_the_end_of_a_long_response() -> None:
    decoded = []

    def counting(token_ids: list[int]) -> str:
        decoded.append(len(token_ids))
        return decode(token_ids)

    stream = TextStream(counting, ["never"])
    content = "aé€😀".encode() * 200
    pieces = [stream.push(content[i : i + 4]) for i in range(0, len(content), 4)]
    assert "".join([*pieces, stream.finish()]) == content.decode()
    assert max(decoded) <= 20
