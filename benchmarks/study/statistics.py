"""From the results of cells to means over seeds, and from two of these to a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Verdict = Literal["supported", "not supported", "not distinguishable"]
Result = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """A quantity under several seeds.

    Attributes:
        values: One per seed, in the order of the seeds.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(self.values))

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1); None for a single seed."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None


def sample(
    results: Iterable[Result], recipe: str, quantity: Callable[[Result], float | None]
) -> Sample | None:
    """A quantity of a recipe; None where no seed has it."""
    of_recipe = sorted(
        (result for result in results if result["recipe"] == recipe),
        key=lambda result: int(result["seed"]),
    )
    values = [quantity(result) for result in of_recipe]
    known = tuple(value for value in values if value is not None)
    return Sample(known) if known else None


def rate(evaluation: str, setting: str, name: str) -> Callable[[Result], float | None]:
    """The quantity `name` of an evaluation under a setting; None where it was not measured."""

    def read(result: Result) -> float | None:
        value = result["evaluations"].get(evaluation, {}).get(setting, {}).get(name)
        return None if value is None else float(value)

    return read


def pooled_std(a: Sample, b: Sample) -> float | None:
    """Standard deviation over seeds that two samples share; None if neither has one."""
    degrees = len(a.values) + len(b.values) - 2
    squares = sum(len(each.values) * np.var(each.values) for each in (a, b))
    return float(np.sqrt(squares / degrees)) if degrees else None


def verdict_greater(a: Sample, b: Sample) -> Verdict:
    """Whether the mean of `a` is greater than that of `b` by more than one standard deviation."""
    difference, std = a.mean - b.mean, pooled_std(a, b)
    if std is None or difference == 0 or abs(difference) <= std:
        return "not distinguishable"
    return "supported" if difference > 0 else "not supported"


def verdict_close(a: Sample, b: Sample, tolerance: float) -> Verdict:
    """Whether the means differ by no more than a tolerance; a larger std can hide either."""
    difference, std = abs(a.mean - b.mean), pooled_std(a, b)
    if difference <= tolerance:
        return "supported" if std is None or std <= tolerance else "not distinguishable"
    if std is not None and difference > std:
        return "not supported"
    return "not distinguishable"


def verdict_within(a: Sample, reference: Sample, tolerance: float) -> Verdict:
    """Whether the mean of `a` lies at most a tolerance below that of the reference."""
    return "supported" if reference.mean - a.mean <= tolerance else "not supported"
