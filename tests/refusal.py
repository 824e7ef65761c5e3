"""The text of a check's error."""

from collections.abc import Callable
from typing import Any

from megatron_dlm.errors import UserError


def refusal(check: Callable[..., Any], *args: Any) -> str | None:
    """The one line with which a check refuses its arguments; None if it accepts them."""
    try:
        check(*args)
    except UserError as error:
        return str(error)
    return None
