"""Numbers of records survive reading, whatever their size."""

import json
from decimal import Decimal
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.data.exact_json import parse_json
from megatron_dlm.data.open_records import open_records
from megatron_dlm.errors import UserError
from megatron_dlm.evaluation.rewards import REWARDS

values = st.recursive(
    st.none()
    | st.booleans()
    | st.text()
    | st.integers()
    | st.floats(allow_nan=False).filter(lambda value: abs(value) != float("inf")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@settings(max_examples=30)
@given(values)
def test_json_is_read_back(value: object) -> None:
    parsed = parse_json(json.dumps(value).encode())
    assert parsed == value
    assert json.dumps(parsed) == json.dumps(value)  # 1.0 is equal to 1


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**300), max_value=10**300))
def test_decimals_keep_their_digits(number: Decimal) -> None:
    assert Decimal(str(parse_json(b"[%s]" % str(number).encode())[0])) == number


@pytest.mark.parametrize(
    ("written", "right", "wrong"),
    [
        (str(2**64), str(2**64), str(2**64 + 1)),
        (str(-(2**63) - 1), str(-(2**63) - 1), str(-(2**63))),
        ("9007199254740993.0", "9007199254740993", "9007199254740992"),
        ("0.1000000000000000055", "0.1000000000000000055", "0.1"),
        ("1" * 4000, "1" * 4000, "1" * 3999 + "2"),
    ],
)
def test_an_answer_is_compared_as_written(
    tmp_path: Path, written: str, right: str, wrong: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "?", "answer": {written}}}\n')
    record = open_records(path, "--prompts").record(0)
    responses = [f"#### {right}", f"#### {wrong}"]
    assert REWARDS["exact_match"].rate([record] * 2, responses) == [1.0, 0.0]


@pytest.mark.parametrize("number", ["1e400", "-1e400", "7" * 5000])
def test_a_number_that_python_cannot_hold_is_refused(tmp_path: Path, number: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "?"}}\n{{"prompt": "?", "answer": {number}}}\n')
    with pytest.raises(UserError, match=rf"^{path}:2: the number {number[:30]}.* as a string$"):
        open_records(path, "--prompts").record(1)


@pytest.mark.parametrize(
    "line", [b'[18446744073709551616, "\\ud800"]', b'["\xff", 1e5]', b"[NaN, 1e5]", b"[1e5"]
)
def test_what_is_no_json_is_none_with_long_numbers_either(line: bytes) -> None:
    with pytest.raises((orjson.JSONDecodeError, ValueError)):
        parse_json(line)
