"""Answers match if their values are equal, compared with Python's own numbers."""

import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dlm.evaluation.math_scoring import is_math, math_answer, math_answers_match
from megatron_dlm.evaluation.scoring import PlainNumber, answers_match

integers = st.integers(-(10**30), 10**30)
small = st.integers(-(10**6), 10**6)


@given(integers)
def test_separators_between_thousands_change_nothing(value: int) -> None:
    for separator in (",", "{,}", r"\,", r",\!"):
        assert answers_match(f"{value:,}".replace(",", separator), str(value))


@given(st.lists(small, min_size=2, max_size=4), st.sampled_from([",", ", "]))
def test_lists_are_no_numbers(values: list[int], comma: str) -> None:
    """Unless a list is spelled exactly as a number with separators is."""
    text = comma.join(str(value) for value in values)
    joined = int("".join(str(abs(value)) for value in values))
    is_spelled_so = text.lstrip("-") == f"{joined:,}"
    assert answers_match(text, f"{int(math.copysign(joined, values[0]))}") is is_spelled_so
    for left, right in ("()", "[]", "{}"):
        assert not answers_match(f"{left}{text}{right}", str(joined))
        assert PlainNumber.read(f"{left}{text}{right}") is None


@given(small, st.integers(0, 6), st.integers(-12, 12), small)
def test_numbers_match_if_their_values_do(digits: int, places: int, power: int, other: int) -> None:
    value = Fraction(digits) * Fraction(10) ** (power - places)
    decimal = Decimal(digits).scaleb(-places)
    for text in (f"{decimal:f}e{power}", rf"${decimal:f} \times 10^{{{power}}}$"):
        assert answers_match(text, f"{decimal.scaleb(power):f}")
        assert answers_match(text, str(other)) is (value == other)


@given(integers, integers)
def test_large_integers_are_exact(left: int, right: int) -> None:
    for other in (right, left + 1):
        assert answers_match(str(left), str(other)) is (left == other)
        assert math_answers_match(f"{left:,}", str(other)) is (left == other)


@pytest.mark.parametrize(
    ("predicted", "expected", "same"),
    [
        ("12", "1,2", False),
        ("1,200", "1, 200", False),
        ("12,34", "1234", False),
        ("0,123", "123", False),
        ("1,200", "(1,200)", False),
        ("1_000", "1000", False),
        ("-$5", "$-5.00", True),
        ("\N{MINUS SIGN}3", "- 3", True),
        ("+3", "3", True),
        ("12.", "12", True),
        ("blue.", "blue", True),
        ("$12$", r"\(12\)", True),
        (r"\$1,200.50", "1200.5", True),
        ("50%", r"50.0\%", True),
        ("50%", "0.5", False),
        ("50%", "50", False),
        ("0.1000000000000000055", "0.1", False),
        ("1e999999999", "10e999999998", True),
        ("1e999999999", "1", False),
        ("(1, 2)", "[1, 2]", False),
    ],
)
def test_text_and_numbers(predicted: str, expected: str, same: bool) -> None:
    assert answers_match(predicted, expected) is same
    assert answers_match(expected, predicted) is same


def test_collections_keep_their_kind() -> None:
    kinds = ["(1, 200)", "[1, 200]", r"\{1, 200\}", "1200"]
    for predicted in kinds:
        for expected in kinds:
            assert math_answers_match(predicted, expected) is (predicted == expected)
    assert math_answers_match(r"\{200, 1\}", r"\left\{1, 200\right\}")
    assert not math_answers_match("(200, 1)", "(1, 200)")


@pytest.mark.parametrize(
    ("predicted", "expected", "same"),
    [
        ("12", "1,2", False),
        ("1,2", "1, 2", True),
        ("2,1", "1, 2", True),  # solutions, in any order
        (r"1\,200", "201", False),  # a product, to math-verify
        (r"1\,200", "1200", True),
        ("1e3", r"\sqrt{1000000}", True),
        ("1e-7", "2e-7", False),
        (r"6.6 \times 10^{-34}", r"1 \times 10^{-34}", False),
        ("0.333333", r"\frac{1}{3}", True),
        ("0.333333", "0.33333333", True),
        ("0.33", r"\frac{1}{3}", False),
        ("50%", "0.5", True),
        ("50%", r"\frac{1}{2}", True),
        ("50%", "0.4", False),
        ("12.", "12", True),
        (r"\frac{1}{2}.", "0.5", True),
        ("x = 5", "5", True),
        (r"12\text{ cm}", "12", True),
        ("x+1", "1+x", True),
        ("x+", "x+", True),  # nothing that can be read: the text decides
        (r"9^{9^{9}}", "12", False),  # given up after some seconds
    ],
)
def test_values(predicted: str, expected: str, same: bool) -> None:
    assert math_answers_match(predicted, expected) is same


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("#### Step 1\n" r"Add them: \boxed{7}", "7"),
        (r"\boxed{3} at first" "\n#### 7.", "7"),
        ("#### $7$", "7"),
        (r"so \boxed{3} and \boxed{7}", "3,7"),
        ("#### ", None),
    ],
)
def test_where_the_answer_of_a_response_is(response: str, answer: str | None) -> None:
    assert math_answer(response) == answer


@pytest.mark.parametrize("reference", ["1e3", r"10,\!000", "12.", "7" * 5000])
def test_numbers_are_math(reference: str) -> None:
    assert is_math(reference)
