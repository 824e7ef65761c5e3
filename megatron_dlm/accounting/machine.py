"""What this machine can do: its rate of matrix products and its memory bandwidth, measured."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_dlm import platform

_SECONDS = 0.04
"""Of repetitions of each kind."""


@dataclass(frozen=True)
class Machine:
    """One device, or the processor cores of one process.

    Attributes:
        flops: Of large matrix products, per second.
        bandwidth: Bytes per second that a large copy reads and writes.
    """

    flops: float
    bandwidth: float

    def floor(self, flops: float, bytes_read: float) -> float:
        """Seconds below which work with so many FLOPs and bytes cannot be done."""
        return max(flops / self.flops, bytes_read / self.bandwidth)


@functools.cache
def measured(dtype: torch.dtype) -> Machine:
    """This process's device at a type of element, measured once (a fifth of a second)."""
    is_cuda, device = platform.is_cuda(), platform.device()
    size = 8192 if is_cuda else 384
    left, right = torch.ones(2, size, size, dtype=dtype, device=device)
    product = torch.empty_like(left)
    source = torch.zeros(1 << (28 if is_cuda else 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Machine(
        flops=2 * size**3 / _seconds(lambda: torch.mm(left, right, out=product)),
        bandwidth=2 * source.numel() / _seconds(lambda: target.copy_(source)),
    )


def _seconds(work: Callable[[], object]) -> float:
    """Of one repetition: the fastest of several rounds, as others may use the machine too."""
    work()  # the first one prepares
    rounds, best, repetitions, ends = 0, float("inf"), 1, time.perf_counter() + _SECONDS
    while rounds < 2 or time.perf_counter() < ends:
        platform.synchronize()
        started = time.perf_counter()
        for _ in range(repetitions):
            work()
        platform.synchronize()
        best = min(best, (time.perf_counter() - started) / repetitions)
        rounds += 1
        repetitions = 4 if platform.is_cuda() else 1
    return best
