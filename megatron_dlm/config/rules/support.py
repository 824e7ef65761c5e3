"""Helpers of rules: the value and the default of an option by its name, and divisors."""

from collections.abc import Iterator
from typing import Any, TypeAlias

from megatron_dlm.config.fields import option_fields
from megatron_dlm.config.schema import Config
from megatron_dlm.errors import UserError

Refusals: TypeAlias = Iterator[str | UserError]
"""What rules refuse: "option: problem; remedy" about the option's value, or a whole error."""


def divisors(number: int) -> str:
    """The divisors of a positive number, for remedies: "1, 2, 4 or 8"."""
    found = [str(n) for n in range(1, number + 1) if number % n == 0]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"


def value_of(config: Config, name: str) -> Any:
    """The value of a field by its flat name."""
    group = option_fields(Config)[name].group
    return getattr(getattr(config, group) if group else config, name)


def default_of(name: str) -> Any:
    """The default of a field by its flat name."""
    return option_fields(Config)[name].default
