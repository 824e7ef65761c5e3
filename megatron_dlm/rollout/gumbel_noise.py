"""Gumbel noise as a hash of counters: the same in every batch, parallel layout and engine.

The noise of a draw is a hash of (seed, sample index, position, denoising step, vocabulary id).
Modelling code of exported folders contains this module.

n: tokens drawn at once; v: vocabulary ids.
"""

import torch
from torch import Tensor

_NOISE_BITS = 40


def _signed(word: int) -> int:
    """The 64-bit word as PyTorch's int64 holds it."""
    return word - (1 << 64) if word >= 1 << 63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(word: Tensor, bits: int) -> Tensor:
    """Logical shift; `>>` on int64 copies the sign bit."""
    return (word >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(word: Tensor) -> Tensor:
    """Finaliser of SplitMix64 (Steele et al. 2014), in place: every bit depends on every bit."""
    word.bitwise_xor_(_shift_right(word, 30)).mul_(_MIX_1)
    word.bitwise_xor_(_shift_right(word, 27)).mul_(_MIX_2)
    return word.bitwise_xor_(_shift_right(word, 31))


def gumbel_noise(
    seed: int,
    sample_index: Tensor,
    position: Tensor,
    denoising_step: Tensor,
    vocabulary_ids: Tensor,
) -> Tensor:
    """Standard Gumbel noise as a pure function of its counters.

    Args:
        seed: Seed of the run's draws.
        sample_index: [n] int64, global index of the sample.
        position: [n] int64, position of the token in its sequence.
        denoising_step: [n] int64.
        vocabulary_ids: [v] int64, ids to compute the noise of.

    Returns:
        [n, v] float32.
    """
    key = torch.full_like(sample_index, _signed(seed % (1 << 64)))
    for counter in (sample_index, position, denoising_step):
        key = _mix(key.bitwise_xor_(counter).add_(_GOLDEN))
    bits = _mix(key[:, None] + (vocabulary_ids + 1) * _GOLDEN)
    uniform = _shift_right(bits, 64 - _NOISE_BITS).float().add_(0.5).mul_(2.0**-_NOISE_BITS)
    # The exponential variate keeps full precision where it is small, which is where draws are
    # decided; the clamp keeps the largest one finite after rounding to float32.
    exponential = uniform.clamp_(max=1.0 - 2.0**-24).neg_().log1p_().neg_()
    return exponential.log_().neg_()
