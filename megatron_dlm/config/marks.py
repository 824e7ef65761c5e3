"""Annotations of option fields, used in `Annotated`."""

from megatron_dlm.ranges import Range

AT_LEAST_ONE = Range(1)
AT_LEAST_ZERO = Range(0)
ABOVE_ZERO = Range(0, above_lowest=True)
PROBABILITY = Range(0, 1, above_lowest=True)
FRACTION = Range(0, 1)
BELOW_ONE = Range(0, 1, below_highest=True)
BETWEEN_ZERO_AND_ONE = Range(0, 1, above_lowest=True, below_highest=True)


class FixedOnResume:
    """A resumed run cannot change the option: it would be a different run, or the value ignored."""


FIXED = FixedOnResume()
