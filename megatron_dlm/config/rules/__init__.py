"""Rules across the options of a configuration, by subject.

A rule is an `if` whose `yield` says what is wrong as "option: problem; remedy", or is the whole
error. `megatron_dlm.config.validation` calls the functions in order and raises the first refusal.
"""

from collections.abc import Iterator
from typing import TypeAlias

from megatron_dlm.errors import UserError

Refusals: TypeAlias = Iterator[str | UserError]


def divisors(number: int) -> str:
    """The divisors of a positive number, for remedies: "1, 2, 4 or 8"."""
    found = [str(n) for n in range(1, number + 1) if number % n == 0]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"
