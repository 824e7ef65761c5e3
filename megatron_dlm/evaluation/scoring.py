"""Compare the final answer of a response with the reference."""

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Self

_FINAL_ANSWER = re.compile(r"####[ \t]*([^\n]*)")
_INLINE_MATH = re.compile(r"(?:\$\$?|\\\(|\\\[)([^$]+?)(?:\$\$?|\\\)|\\\])")

# Separators of thousands in text and LaTeX: 1,200  1{,}200  1\,200  1,\!200
_SEPARATOR = r"(?:,\\!|\{,\}|\\,|,)"
_NUMBER = re.compile(
    rf"""
    (?:\\?\$)? \s? (?P<sign>[+\-\N{{MINUS SIGN}}]?) \s? (?:\\?\$)? \s?
    (?=\.?\d) (?P<integer> [1-9]\d{{0,2}} (?:{_SEPARATOR}\d{{3}})+ | \d* )
    (?P<fraction> \.\d* )?
    (?: e (?P<exponent>[+-]?\d+) | \s*\\(?:times|cdot)\s* 10\^ (?:\{{(?P<braced>[+-]?\d+)\}}|(?P<digit>\d)) )?
    \s* (?P<percent> \\?% )?
    """,  # noqa: E501
    re.VERBOSE | re.IGNORECASE,
)


def final_answer(text: str) -> str | None:
    """Return what follows the last ``####`` of a response, to the end of its line.

    Returns:
        The answer without surrounding blanks; None if there is no ``####`` or nothing after it.
    """
    answers = _FINAL_ANSWER.findall(text)
    return (answers[-1].strip() or None) if answers else None


def bare_answer(answer: str) -> str:
    """An answer without surrounding blanks, a final full stop and the marks of inline LaTeX."""
    answer = answer.strip().removesuffix(".").rstrip()
    inline = _INLINE_MATH.fullmatch(answer)
    return inline[1].strip() if inline else answer


@dataclass(frozen=True)
class PlainNumber:
    """A number that is written out: 12, -1,200.5, $5, 6.6e-34, 50%.

    Attributes:
        value: As written, before the percent sign; exact.
        is_percentage: Whether a percent sign follows.
    """

    value: Decimal
    is_percentage: bool

    @classmethod
    def read(cls, answer: str) -> Self | None:
        r"""Read an answer; None if it is anything else, or a list of numbers.

        A comma separates thousands only where three digits follow each: 1,200 is a number; 1,2 and
        12,34 are two. The same holds for LaTeX's forms (``1{,}200``, ``1,\!200``, ``1\,200``).
        """
        found = _NUMBER.fullmatch(bare_answer(answer))
        if found is None:
            return None
        sign = "-" if found["sign"] not in ("", "+") else ""
        integer = re.sub(r"\D", "", found["integer"])
        exponent = found["exponent"] or found["braced"] or found["digit"] or "0"
        try:
            value = Decimal(f"{sign}{integer}{found['fraction'] or ''}e{exponent}")
        except InvalidOperation:  # an exponent beyond what Decimal can hold
            return None
        return cls(value, found["percent"] is not None)


def answers_match(predicted: str | None, expected: str) -> bool:
    """Whether two answers are the same: equal numbers ("1,200" = "1200.0"), else equal text."""
    if predicted is None:
        return False
    numbers = PlainNumber.read(predicted), PlainNumber.read(expected)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return bare_answer(predicted) == bare_answer(expected)
