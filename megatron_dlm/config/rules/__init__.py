"""Rules across the options of a configuration, by subject.

A rule is an `if` whose `yield` says "option: problem; remedy", or is the whole error; `validation`
calls the functions in order and raises the first.
"""

from collections.abc import Iterator
from typing import TypeAlias

from megatron_dlm.errors import UserError

Refusals: TypeAlias = Iterator[str | UserError]


def divisors(number: int) -> str:
    """The divisors of a positive number, for remedies: "1, 2, 4 or 8"."""
    *found, last = (str(n) for n in range(1, number + 1) if number % n == 0)
    return f"{', '.join(found)} or {last}" if found else last
