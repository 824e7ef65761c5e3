"""Annotations of option fields, used in `Annotated`, and types of option fields."""

from typing import Annotated

from pydantic import AfterValidator, InstanceOf
from pydantic_core import PydanticCustomError

from megatron_dlm.ranges import Range

AT_LEAST_ONE = Range(1)
AT_LEAST_TWO = Range(2)
AT_LEAST_HALF = Range(0.5, 1)
AT_LEAST_ZERO = Range(0)
ABOVE_ZERO = Range(0, above_lowest=True)
PROBABILITY = Range(0, 1, above_lowest=True)
FRACTION = Range(0, 1)
BELOW_ONE = Range(0, 1, below_highest=True)
BETWEEN_ZERO_AND_ONE = Range(0, 1, above_lowest=True, below_highest=True)
TEMPERATURE = Range(0, 100)
"""Of a softmax. Far above, logits of MASK and padding, the lowest of their type, could be drawn."""
FIXED = "fixed on resume"
"""A resumed run cannot change the option: it would be a different run, or the value ignored."""
NOT_AN_OPTION = "not an option"
"""The field is not read from the command line or YAML."""


def _checked(text: str) -> str:
    if not text:
        raise PydanticCustomError("string_too_short", "empty")
    if "\0" in text:
        raise PydanticCustomError("string_pattern_mismatch", "NUL")
    return text


# Not `str`, for pydantic refuses names of files that are no UTF-8 or were read in an ASCII locale.
Text = Annotated[InstanceOf[str], AfterValidator(_checked)]
"""Text of an option: no path, and nothing else that an option means, is empty or holds a NUL."""
