"""Decoding settings as they are written: needs no PyTorch.

A setting is the short name of a strategy with the value of its option after a colon, such as
`static:2` (denoising steps per block) and `dynamic:0.7` (threshold), or `autoregressive`. After an
@ it has a block size of its own: `dynamic:0.7@8`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.rollout.strategies import STRATEGIES, Strategy


@dataclass(frozen=True)
class DecodingSetting:
    """A decoding setting; whatever it does not name is as in the options.

    Attributes:
        text: As it was written.
        options: Decoding options that it names, by field; none: autoregressive decoding.
        block_size: Its own; None for that of the options.
    """

    text: str
    options: dict[str, Any]
    block_size: int | None

    @classmethod
    def parse(cls, text: str, field: str) -> Self:
        """Read a setting.

        Args:
            text: The setting.
            field: The option that it is a value of, for error messages.

        Raises:
            UserError: It is no setting.
        """
        decoding, at, size = text.strip().partition("@")
        block_size = None
        if at and decoding == "autoregressive":
            raise bad_value(field, text, "has no blocks", "drop what follows autoregressive")
        if at:
            if not (size.isascii() and size.isdecimal() and 0 < len(size) < 10 and int(size) > 0):
                problem = f"{size!r} is no block size"
                raise bad_value(field, text, problem, "write a number after the @, 1 or more")
            block_size = int(size)
        options = _options_named(decoding)
        if options is None:
            raise _no_setting(text, field)
        return cls(text, options, block_size)

    @property
    def is_autoregressive(self) -> bool:
        """Whether tokens are decoded one by one, from left to right."""
        return not self.options

    @property
    def strategy(self) -> Strategy:
        """The strategy of a setting that is not autoregressive."""
        return STRATEGIES[self.options["remasking_strategy"]]

    @property
    def option_left(self) -> str | None:
        """The strategy's option, where it is as in the options; None if there is none to read."""
        option = None if self.is_autoregressive else self.strategy.option
        return None if option is None or option.name in self.options else option.name


def _options_named(decoding: str) -> dict[str, Any] | None:
    """Decoding options that a setting without block size stands for; None if it is no setting."""
    name, colon, value = decoding.partition(":")
    if name == "autoregressive" and not colon:
        return {}
    strategy = next((s for s in STRATEGIES.values() if s.short_name == name), None)
    if strategy is None or (colon and strategy.option is None):
        return None
    named: dict[str, Any] = {"remasking_strategy": strategy.name}
    if colon and strategy.option is not None:
        option = strategy.option
        try:
            named[option.name] = option.type(value)
        except ValueError:
            return None
        if named[option.name] not in option.range:
            return None
    return named


def _no_setting(text: str, field: str) -> UserError:
    forms = []
    for strategy in STRATEGIES.values():
        forms.append(strategy.short_name)
        if strategy.option is not None:
            option = strategy.option
            forms.append(f"{strategy.short_name}:<{option.unit}, {option.range}>")
    return bad_value(
        field, text, "is no decoding setting", f"write {', '.join(forms)} or autoregressive"
    )
