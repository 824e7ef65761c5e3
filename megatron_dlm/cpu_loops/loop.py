"""What makes a function a loop.

Arrays are contiguous; floating numbers are of one type, float32 or float64, and sums are of it
too, but where a loop says otherwise. A row's result depends on that row only. A loop takes no
memory of its own, raises nothing, and calls what is in this package or in C's library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import njit

Floats = Any
"""Where floating numbers lie, as an argument."""
Doubles = Any
"""Where float64 numbers lie."""
Integers = Any
"""Where int64 numbers lie."""

Function = Callable[..., Any]


class Loop(NamedTuple):
    """What becomes a function of C.

    Attributes:
        function: Its arguments are annotated with what they are.
        fastmath: LLVM's freedoms with its floating-point operations.
        only_float32: Whether there is none for float64.
    """

    function: Function
    fastmath: frozenset[str]
    only_float32: bool


LOOPS: dict[str, Loop] = {}
"""By name."""


def loop(*freedoms: str, only_float32: bool = False) -> Callable[[Function], Function]:
    """Have a function become one of C."""

    def registered(function: Function) -> Function:
        LOOPS[function.__name__] = Loop(function, frozenset({"contract", *freedoms}), only_float32)
        return function

    return registered


def helper(*freedoms: str) -> Callable[[Function], Function]:
    """A function that loops call."""
    return njit(fastmath={"contract", *freedoms}, error_model="numpy")
