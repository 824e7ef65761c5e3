"""Compare mathematical answers by their value, with math-verify."""

from typing import Any

from megatron_dlm.evaluation.scoring import answers_match, final_answer


def math_answer(text: str) -> str | None:
    r"""Return what follows the last ``####`` of a response, else the answer that math-verify finds.

    Returns:
        An expression, LaTeX or plain (``\frac{1}{2}``, ``0.5``); None if there is none.
    """
    answer = final_answer(text)
    if answer is not None:
        return answer.strip("$") or None
    from math_verify import parse  # not at the top: it loads sympy

    found = parse(text)
    # The expression comes first, the text that it was read from last.
    return str(found[-1]) if found else None


def math_answers_match(predicted: str | None, expected: str) -> bool:
    """Whether two answers are the same number or text, or two expressions have the same value."""
    if predicted is None:
        return False
    # math-verify knows less of plain numbers: to it, 1e3 is a product with Euler's number.
    if answers_match(predicted, expected):
        return True
    from math_verify import verify

    return bool(verify(_parse(expected), _parse(predicted)))


def is_math(reference: str) -> bool:
    """Whether math-verify reads an expression, rather than text alone or nothing."""
    return any(not isinstance(found, str) for found in _parse(reference))


def _parse(answer: str) -> list[Any]:
    """What math-verify reads in an answer as a whole, which it takes a box for."""
    from math_verify import parse

    return list(parse(f"\\boxed{{{answer.strip('$')}}}"))
