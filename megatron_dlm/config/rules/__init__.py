"""Rules across the options of a configuration, by subject.

A rule is an `if` whose `yield` says "option: problem; remedy", or is the whole error. Its function
registers itself for stages (`rule`); `validation` goes through these and raises the first refusal.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias, TypeVar

from megatron_dlm.errors import UserError

Refusals: TypeAlias = Iterator[str | UserError]
Rule = TypeVar("Rule", bound=Callable[..., Refusals])
_RULES: dict[str, list[Callable[..., Refusals]]] = {}


def rule(*stages: str) -> Callable[[Rule], Rule]:
    """Register a function for stages of `validation`, which calls it for each."""

    def register(function: Rule) -> Rule:
        for stage in stages:
            _RULES.setdefault(stage, []).append(function)
        return function

    return register


def refusals(stage: str, *of: object) -> list[Refusals]:
    """What the functions of a stage refuse of its arguments, in the order of files and lines."""
    found = sorted(_RULES[stage], key=lambda f: (f.__module__, f.__code__.co_firstlineno))
    return [function(*of) for function in found]


def divisors(number: int) -> str:
    """The divisors of a positive number, for remedies: "1, 2, 4 or 8"."""
    *found, last = (str(n) for n in range(1, number + 1) if number % n == 0)
    return f"{', '.join(found)} or {last}" if found else last
