"""JSON whose numbers keep all digits of the file, so that answers are compared as written."""

import codecs
import json
import math
import re
from decimal import Decimal
from typing import Any, NoReturn

import orjson

# A number that may not fit 64 bits: orjson would round it. A match inside a string is harmless.
_LONG_NUMBER = re.compile(rb"[\d.]{16}|\d[eE]")


class WrittenFloat(float):
    """A float whose text keeps all digits of the file."""

    text: str

    def __str__(self) -> str:
        return self.text


class UnreadableNumber(ValueError):
    """A number that JSON allows and Python does not."""


def parse_json(line: bytes) -> Any:
    """Parse a line; integers are exact, and `str` of a number has all its digits.

    A byte order mark before it, as Windows' programs write, is skipped.

    Raises:
        json.JSONDecodeError: The line is no JSON.
        UnreadableNumber: A number is infinite as a float or an integer of thousands of digits.
    """
    line = line.removeprefix(codecs.BOM_UTF8)
    if _LONG_NUMBER.search(line) is None:
        return orjson.loads(line)
    try:
        value = json.loads(
            line.decode(),
            parse_int=_parse_integer,
            parse_float=_parse_float,
            parse_constant=_refuse_number,
        )
        json.dumps(value, ensure_ascii=False).encode()  # no half of a surrogate pair
    except (UnicodeError, RecursionError):
        return orjson.loads(line)  # whose error says what is wrong
    return value


def _parse_integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        return _refuse_number(text)


def _parse_float(text: str) -> float:
    value = WrittenFloat(text)
    if math.isinf(value):
        _refuse_number(text)
    if Decimal(text) == Decimal(repr(float(value))):
        return float(value)
    value.text = text
    return value


def _refuse_number(text: str) -> NoReturn:
    raise UnreadableNumber(text if len(text) <= 30 else f"{text[:30]}...")
