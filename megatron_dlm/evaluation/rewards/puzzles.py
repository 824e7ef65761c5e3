"""Countdown and Sudoku: many answers may be right, and each can be checked.

The answer of a response is what stands in its last <answer> tags, its last box, or after its last
####; for Sudoku, without any of them, the last lines that make a grid.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from math import isqrt

from megatron_dlm.evaluation.rewards.base import Record, RuleReward, field_of, unrated
from megatron_dlm.evaluation.scoring import final_answer

_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOX = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_LONGEST = 400


def _answer(response: str) -> str | None:
    for found in (_TAGS.findall(response), _BOX.findall(response)):
        if found:
            return str(found[-1])
    return final_answer(response)


def _check_countdown(record: Record, where: str) -> None:
    numbers = field_of(record, "numbers", list, where, "a list of numbers")
    if not numbers or not all(type(number) is int for number in numbers):
        raise unrated(where, f'"numbers" = {numbers!r} is not a list of whole numbers')
    field_of(record, "target", int, where, "a whole number")


def _rate_countdown(record: Record, response: str) -> float:
    answer = _answer(response)
    if answer is None or len(answer) > _LONGEST:
        return 0.0
    for written, symbol in (
        (r"\times", "*"), (r"\cdot", "*"), (r"\div", "/"), (r"\left", ""), (r"\right", ""),
        ("\N{MULTIPLICATION SIGN}", "*"), ("\N{DIVISION SIGN}", "/"), ("\N{MINUS SIGN}", "-"),
         ("[", "("), ("]", ")"), ("$", ""),
    ):  # fmt: skip
        answer = answer.replace(written, symbol)
    answer = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", answer)
    expression = answer.split("=")[0].strip()
    used: list[int] = []
    try:
        value = _value(ast.parse(expression, mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return 0.0
    return float(value == record["target"] and Counter(used) == Counter(record["numbers"]))


def _value(node: ast.expr, used: list[int]) -> Fraction:
    """The value of an expression; notes the numbers in it.

    Raises:
        ValueError: It has something besides whole numbers, + - * / and brackets.
    """
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, used), _value(node.right, used)
        return _OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    raise ValueError(ast.dump(node))


COUNTDOWN = RuleReward("countdown", _rate_countdown, _check_countdown)


def _side(cells: str) -> int | None:
    """Side of a square grid of square boxes; None for another number of cells."""
    side = isqrt(len(cells))
    return side if side * side == len(cells) and isqrt(side) ** 2 == side > 1 else None


def _puzzle(record: Record) -> str:
    return re.sub(r"\s", "", record["puzzle"]).replace(".", "0").replace("_", "0")


def _check_sudoku(record: Record, where: str) -> None:
    field_of(record, "puzzle", str, where, "text")
    cells = _puzzle(record)
    if not cells.isdigit() or _side(cells) not in (4, 9):
        raise unrated(where, f'"puzzle" = {record["puzzle"]!r} is not 16 or 81 digits, 0 for empty')


def _rate_sudoku(record: Record, response: str) -> float:
    puzzle = _puzzle(record)
    answer = _answer(response)
    digits = re.sub(r"\D", "", response if answer is None else answer)
    if answer is None:
        lines = [re.sub(r"[\s|,]", "", line) for line in response.splitlines()]
        rows = [line for line in lines if line.isdigit()]
        digits = "".join(rows)[-len(puzzle) :]
    return float(_is_solution(digits, puzzle))


def _is_solution(digits: str, puzzle: str) -> bool:
    side = _side(puzzle)
    assert side is not None
    if len(digits) != len(puzzle):
        return False
    if any(given not in ("0", digit) for given, digit in zip(puzzle, digits, strict=True)):
        return False
    box, all_digits = isqrt(side), {str(digit) for digit in range(1, side + 1)}
    places = range(side)
    groups = [
        *([(row, column) for column in places] for row in places),
        *([(row, column) for row in places] for column in places),
        *(
            [(first // box * box + i // box, first % box * box + i % box) for i in places]
            for first in places
        ),
    ]
    return all(
        {digits[row * side + column] for row, column in group} == all_digits for group in groups
    )


SUDOKU = RuleReward("sudoku", _rate_sudoku, _check_sudoku)
