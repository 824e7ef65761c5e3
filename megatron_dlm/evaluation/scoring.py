"""Compare the final answer of a response with the reference."""

import re
from decimal import Decimal, InvalidOperation

_FINAL_ANSWER = re.compile(r"####[ \t]*([^\n]*)")


def final_answer(text: str) -> str | None:
    """Return what follows the last ``####`` of a response, to the end of its line.

    Returns:
        The answer without surrounding blanks; None if there is no ``####`` or nothing behind it.
    """
    answers = _FINAL_ANSWER.findall(text)
    return (answers[-1].strip() or None) if answers else None


def answers_match(predicted: str | None, expected: str) -> bool:
    """Whether two answers are the same: equal numbers ("1,200" = "1200.0"), else equal text."""
    if predicted is None:
        return False
    predicted_number, expected_number = _number(predicted), _number(expected)
    if predicted_number is not None and expected_number is not None:
        return predicted_number == expected_number
    return predicted.strip() == expected.strip()


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.strip().replace(",", "").removeprefix("$"))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
