"""The uniform number of a draw as a hash of counters: the same in every batch, layout and engine.

A draw has one number, a hash of (seed, sample index, position, denoising step). Counters on the
host are NumPy arrays, whose operations are many times as quick to call as PyTorch's. Modelling code
of exported folders contains this module.

n: tokens drawn at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

_UNIFORM_BITS = 53  # of a float64


def signed(word: int) -> int:
    """The lowest 64 bits of a number as PyTorch's int64 holds them."""
    word %= 1 << 64
    return word - (1 << 64) if word >= 1 << 63 else word


_GOLDEN = signed(0x9E3779B97F4A7C15)
_MIX_1 = signed(0xBF58476D1CE4E5B9)
_MIX_2 = signed(0x94D049BB133111EB)


Words = TypeVar("Words", Tensor, "np.ndarray[Any, Any]")
"""int64, [n]."""


def _shift_right(word: Words, bits: int) -> Words:
    """Logical shift; `>>` on int64 copies the sign bit."""
    shifted = word >> bits
    shifted &= (1 << (64 - bits)) - 1
    return shifted


def _mix(word: Words) -> Words:
    """Finaliser of SplitMix64 (Steele et al. 2014), in place: every bit depends on every bit."""
    word ^= _shift_right(word, 30)
    word *= _MIX_1
    word ^= _shift_right(word, 27)
    word *= _MIX_2
    word ^= _shift_right(word, 31)
    return word


def counter_uniforms(
    seed: int | Words, sample_index: Words, position: Words, denoising_step: Words
) -> Words:
    """Uniform numbers in [0, 1) as a pure function of their counters, all tensors or all arrays.

    Args:
        seed: Seed of the run's draws; or one for each, [n] int64, from `signed`.
        sample_index: [n] int64, global index of the sample.
        position: [n] int64, position of the token in its sequence.
        denoising_step: [n] int64.

    Returns:
        [n] float64, multiples of 2^-53.
    """
    key: Any = signed(seed) if isinstance(seed, int) else seed
    for counter in (sample_index, position, denoising_step):
        key = key ^ counter
        key += _GOLDEN
        key = _mix(key)
    high = _shift_right(key, 64 - _UNIFORM_BITS)
    numbers: Any = high.double() if isinstance(high, Tensor) else high.astype(float)
    numbers *= 2.0**-_UNIFORM_BITS
    return numbers
