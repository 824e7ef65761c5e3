"""Compare mathematical answers by their value, with math-verify."""

from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from typing import Any

from megatron_dlm.evaluation.scoring import (
    PlainNumber,
    answers_match,
    bare_answer,
    final_answer,
)

# Decimal places to which math-verify compares numbers by default.
_DECIMALS = 6
_WIDE = Context(Emax=MAX_EMAX, Emin=MIN_EMIN)


def math_answer(text: str) -> str | None:
    r"""Return the answer of a response.

    The text after the last ``####``, unless a box follows that (``####`` is a heading then);
    without ``####``, the answer that math-verify finds.

    Returns:
        An expression, LaTeX or plain (``\frac{1}{2}``, ``0.5``); None if there is none.
    """
    answer = final_answer(text)
    if answer is not None and text.rfind(r"\boxed") < text.rfind("####"):
        return bare_answer(answer) or None
    from math_verify import parse  # not at the top: it loads sympy

    found = parse(text)
    # The expression comes first, the text that it was read from last.
    return str(found[-1]) if found else None


def math_answers_match(predicted: str | None, expected: str) -> bool:
    """Whether two answers have the same value.

    Written-out numbers are compared here, because math-verify gets some wrong: it reads 1e3 as a
    product with Euler's number, and takes 1e-7 for equal to 2e-7. All else that it can read is
    compared by math-verify. Text is compared only where it can read nothing.
    """
    if predicted is None:
        return False
    numbers = PlainNumber.read(predicted), PlainNumber.read(expected)
    if numbers[0] and numbers[1] and numbers[0].is_percentage == numbers[1].is_percentage:
        return _close(numbers[0].value, numbers[1].value)
    found, wanted = _expressions(predicted), _expressions(expected)
    if not found or not wanted:
        return answers_match(predicted, expected)
    if {_collection(predicted, found[0]), _collection(expected, wanted[0])} == {"set", "tuple"}:
        return False
    from math_verify import verify

    return bool(verify(wanted, found))


def is_math(reference: str) -> bool:
    """Whether a reference is a number or an expression, rather than text alone or nothing."""
    return PlainNumber.read(reference) is not None or bool(_expressions(reference))


def _close(predicted: Decimal, expected: Decimal) -> bool:
    """Equal up to math-verify's tolerance, with as many significant digits below 1."""
    difference = _WIDE.subtract(predicted, expected).copy_abs()
    # All digits of a small number would be beyond those that math-verify compares.
    decimals = _DECIMALS - min(0, expected.adjusted() + 1 if expected else 0)
    return not difference or difference < Decimal((0, (5,), -decimals - 1))


def _expressions(answer: str) -> list[Any]:
    """The expression that math-verify reads if the whole answer is put into a box; None if none."""
    from math_verify import parse

    found = parse(f"\\boxed{{{_in_latex(answer)}}}")
    return [expression for expression in found if not isinstance(expression, str)]


def _in_latex(answer: str) -> str:
    """The answer, with numbers written in a form that math-verify reads as numbers."""
    number = PlainNumber.read(answer)
    if number is None:
        return bare_answer(answer)
    percent = r"\%" if number.is_percentage else ""
    value = number.value
    if not value or -_DECIMALS <= value.adjusted() < _DECIMALS:
        return f"{value:f}{percent}"
    _, digits, exponent = value.as_tuple()
    sign = "-" if value < 0 else ""
    return rf"{sign}{''.join(map(str, digits))} \cdot 10^{{{exponent}}}{percent}"


def _collection(answer: str, expression: Any) -> str | None:
    """The kind of an answer, `set` or `tuple` (or interval); None for a bare list."""
    from sympy import FiniteSet, Interval, Tuple

    if isinstance(expression, Interval | Tuple):
        return "tuple"
    in_braces = bare_answer(answer).replace(r"\left", "").lstrip("\\ ").startswith("{")
    return "set" if isinstance(expression, FiniteSet) and in_braces else None
