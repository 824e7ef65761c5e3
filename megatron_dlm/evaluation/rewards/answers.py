"""Answers that are compared with the reference of a record: text, numbers, expressions, letters."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dlm.errors import UserError
from megatron_dlm.evaluation.math_processes import rate_answers
from megatron_dlm.evaluation.math_scoring import is_math, math_answer, math_answers_match
from megatron_dlm.evaluation.rewards.base import Record, RuleReward, without_thinking
from megatron_dlm.evaluation.scoring import answers_match, final_answer

# What may stand between the words and the letter: quotes, stars, brackets, marks of LaTeX.
_OPENING = r"""(?:[\s"'`*(\[$]|\\[(\[]|\\(?:text|math)\w*\{|(?:option|choice)\s)*"""
# A small letter may be a word ("the answer is a number"); as a choice, something closes it.
_LETTER = r"""(?-i:([A-Z](?![A-Za-z]|'[a-z])|[a-z](?=\s*(?:[)\]}*"'`.,;:$\\]|$))))"""
_COLON = r"[:\N{FULLWIDTH COLON}]"
_FLAGS = re.IGNORECASE | re.MULTILINE

_CHOICES = (
    re.compile(rf"""["'`*]?answer["'`*]*\s*{_COLON}{_OPENING}{_LETTER}""", _FLAGS),
    re.compile(r"\\boxed\{\s*(?:\\(?:text|math)\w*\{)?\s*\(?([A-Z])(?:[).:][^{}]*)?\}"),
    re.compile(r"####\s*\(?([A-Z])(?![A-Za-z])"),
    re.compile(rf"answer\s+is\s*{_COLON}?{_OPENING}{_LETTER}", _FLAGS),
    re.compile(rf"答案(?:选项|是|为|{_COLON})+{_OPENING}{_LETTER}"),
)
_LONE_LETTER = re.compile(r"\s*[(*\"'`]*([A-Z])(?:[)*\"'`.:]+(?:\s.*)?|\s*)", re.DOTALL)


def choice(text: str) -> str | None:
    """The letter that a response chooses; None if there is none.

    The last of the form asked for, ``"answer": "C"``; without one, the last in a box, after ####,
    or after "answer is"; else the letter that the response begins with.
    """
    for form in _CHOICES:
        found = form.findall(text)
        if found:
            return str(found[-1]).upper()
    alone = _LONE_LETTER.fullmatch(text)
    return alone[1] if alone else None


@dataclass(frozen=True)
class Answer:
    """How an answer is found in a response and compared.

    Attributes:
        name: Of the reward.
        extract: Takes the text of a response and returns its answer; None if there is none.
        matches: Whether an extracted answer equals the reference.
        can_read: Whether answers can be compared with a reference.
    """

    name: str
    extract: Callable[[str], str | None]
    matches: Callable[[str | None, str], bool]
    can_read: Callable[[str], bool] = bool

    def reference(self, record: Record, where: str) -> str:
        """Return the reference of a record: `answer`, or what follows the last ``####`` in that.

        GSM8K gives an answer this way, after the solution.

        Raises:
            UserError: The field is missing or is neither text nor a number.
        """
        value: Any = record.get("answer")
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UserError(
                f'{where}: "answer" = {value!r}: reward {self.name!r} needs text or a number to '
                "compare with; add the field or choose another reward"
            )
        text = str(value)
        return (final_answer(text) or "") if "####" in text else text

    def check(self, record: Record, where: str) -> None:
        """Check that answers can be compared with the reference of a record.

        Raises:
            UserError: They cannot.
        """
        if not self.can_read(self.reference(record, where)):
            raise UserError(
                f'{where}: "answer" = {record["answer"]!r}: reward {self.name!r} cannot read it, '
                "so no answer could be right; repair it or choose another reward"
            )

    def rate(self, record: Record, response: str) -> float:
        """1 if the answer of a response matches, else 0."""
        return float(self.matches(self.extract(response), self.reference(record, "a prompt")))

    def reward(self, package: str | None = None) -> RuleReward:
        """The reward; `package` of an extra is imported by it."""
        return RuleReward(self.name, self.rate, self.check, package)


class MathReward(RuleReward):
    """`math_verify`, whose responses are rated by several processes at once where they are many."""

    def rate(self, records: Sequence[Record], responses: Sequence[str]) -> list[float]:
        """See `Reward`."""
        pairs = [
            (without_thinking(response), MATH_ANSWER.reference(record, "a prompt"))
            for record, response in zip(records, responses, strict=True)
        ]
        return rate_answers(pairs)


EXACT_MATCH = Answer("exact_match", final_answer, answers_match).reward()
MATH_ANSWER = Answer("math_verify", math_answer, math_answers_match, is_math)
MATH_VERIFY = MathReward(MATH_ANSWER.name, MATH_ANSWER.rate, MATH_ANSWER.check, "math_verify")
CHOICE = Answer(
    "choice",
    choice,
    lambda predicted, expected: predicted == expected.strip().upper(),
    lambda reference: re.fullmatch(r"\s*[A-Za-z]\s*", reference) is not None,
).reward()
