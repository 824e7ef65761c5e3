"""The exponential of a float32, without a call."""

from __future__ import annotations

import numpy as np
from numpy import float32, int32

from megatron_dlm.cpu_loops.loop import helper


@helper()
def exp(x: float32) -> float32:
    """The exponential of a float32 below 88, to 2e-7, in operations that become vectors' ones.

    It is 2^n exp(r) with |r| <= log(2) / 2, where log(2) is the sum of two numbers of which n times
    the first is exact (Cody and Waite 1980), and exp(r) are eight terms of its series. Below
    -87, where it is 2e-38, it is 0.
    """
    t = max(x, float32(-87))
    n = np.floor(t * float32(1.4426950408889634) + float32(0.5))
    r = (t - n * float32(0.693359375)) + n * float32(2.121944400546905e-4)
    p = float32(1 / 5040)
    p = p * r + float32(1 / 720)
    p = p * r + float32(1 / 120)
    p = p * r + float32(1 / 24)
    p = p * r + float32(1 / 6)
    p = p * r + float32(0.5)
    p = p * r + float32(1)
    p = p * r + float32(1)
    p *= int32((int32(n) + 127) << 23).view(float32)
    return p if x >= float32(-87) else float32(0)
