"""Compare mathematical answers by their value, with math-verify."""

from megatron_dlm.evaluation.scoring import final_answer


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
    """Whether two expressions have the same value; one that cannot be read has none."""
    if predicted is None:
        return False
    from math_verify import parse, verify

    # Boxed is what math-verify takes for an answer as a whole.
    gold, answer = (parse(f"\\boxed{{{text}}}") for text in (expected.strip("$"), predicted))
    return bool(verify(gold, answer))
