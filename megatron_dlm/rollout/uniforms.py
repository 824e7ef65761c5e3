"""The uniform number of a draw as a hash of counters: the same in every batch, layout and engine.

A draw has one number, a hash of (seed, sample index, position, denoising step). Modelling code of
exported folders contains this module.

n: tokens drawn at once.
"""

import torch
from torch import Tensor

_UNIFORM_BITS = 53  # of a float64


def signed(word: int) -> int:
    """The lowest 64 bits of a number as PyTorch's int64 holds them."""
    word %= 1 << 64
    return word - (1 << 64) if word >= 1 << 63 else word


_GOLDEN = signed(0x9E3779B97F4A7C15)
_MIX_1 = signed(0xBF58476D1CE4E5B9)
_MIX_2 = signed(0x94D049BB133111EB)


def _shift_right(word: Tensor, bits: int) -> Tensor:
    """Logical shift; `>>` on int64 copies the sign bit."""
    return (word >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(word: Tensor) -> Tensor:
    """Finaliser of SplitMix64 (Steele et al. 2014), in place: every bit depends on every bit."""
    word.bitwise_xor_(_shift_right(word, 30)).mul_(_MIX_1)
    word.bitwise_xor_(_shift_right(word, 27)).mul_(_MIX_2)
    return word.bitwise_xor_(_shift_right(word, 31))


def counter_uniforms(
    seed: int | Tensor, sample_index: Tensor, position: Tensor, denoising_step: Tensor
) -> Tensor:
    """Uniform numbers in [0, 1) as a pure function of their counters.

    Args:
        seed: Seed of the run's draws; or one for each, [n] int64, from `signed`.
        sample_index: [n] int64, global index of the sample.
        position: [n] int64, position of the token in its sequence.
        denoising_step: [n] int64.

    Returns:
        [n] float64, multiples of 2^-53.
    """
    if isinstance(seed, int):
        key = torch.full_like(sample_index, signed(seed))
    else:
        key = seed.clone()
    for counter in (sample_index, position, denoising_step):
        key = _mix(key.bitwise_xor_(counter).add_(_GOLDEN))
    return _shift_right(key, 64 - _UNIFORM_BITS).double().mul_(2.0**-_UNIFORM_BITS)
