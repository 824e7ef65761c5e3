"""Ranges of numbers, to annotate options with."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """An interval of numbers.

    Attributes:
        lowest: Its lower end.
        highest: Its upper end; None for none.
        above_lowest: Whether the lower end itself is left out.
        below_highest: Whether the upper end itself is left out.
    """

    lowest: float
    highest: float | None = None
    above_lowest: bool = False
    below_highest: bool = False

    def __contains__(self, number: float) -> bool:
        """Whether a number lies in the interval; NaN never does."""
        is_above = number > self.lowest if self.above_lowest else number >= self.lowest
        if self.highest is None:
            return is_above
        is_below = number < self.highest if self.below_highest else number <= self.highest
        return is_above and is_below

    def __str__(self) -> str:
        """`1 or more`, `above 0`, or an interval such as `(0, 1]`."""
        if self.highest is None:
            return f"above {self.lowest}" if self.above_lowest else f"{self.lowest} or more"
        left, right = "(" if self.above_lowest else "[", ")" if self.below_highest else "]"
        return f"{left}{self.lowest}, {self.highest}{right}"

    @property
    def problem(self) -> str:
        """The problem with a number outside the interval, for error messages."""
        if self.highest is not None:
            return f"is outside {self}"
        if self.lowest == 0:
            return "is not positive" if self.above_lowest else "is negative"
        return f"is less than {self.lowest}"

    @property
    def remedy(self) -> str:
        """The remedy for such a number."""
        if self.highest is None:
            return f"choose a number {self}" if self.above_lowest else f"choose {self}"
        example = min((self.lowest + self.highest) / 2, self.lowest + 1)
        return f"choose a number in {self}, e.g. {example:g}"


AT_LEAST_ONE = Range(1)
AT_LEAST_TWO = Range(2)
AT_LEAST_ZERO = Range(0)
AT_LEAST_HALF = Range(0.5, 1)
ABOVE_ZERO = Range(0, above_lowest=True)
PROBABILITY = Range(0, 1, above_lowest=True)
FRACTION = Range(0, 1)
BELOW_ONE = Range(0, 1, below_highest=True)
BETWEEN_ZERO_AND_ONE = Range(0, 1, above_lowest=True, below_highest=True)
TEMPERATURE = Range(0, 100)
"""Of a softmax. Far above, logits of MASK and padding, the lowest of their type, could be drawn."""
