"""The search for the logit where top-p ends, over ranks that hold shards of the vocabulary.

Modelling code of exported folders contains this module.

n: tokens drawn at once; v: this rank's columns of the vocabulary; tp: ranks.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

DIGIT_BITS = 8  # of the keys, looked at together by a pass
_KEY_BITS = 32
_SEARCHED_LOGITS = 1 << 18  # at a time, as they are copied
LOG_VOCABULARY = 13.0

# Makes [tp, ...] in the order of ranks from each rank's [...].
Gather = Callable[[Tensor], Tensor]


def only_rank(values: Tensor) -> Tensor:
    """The `Gather` of one rank that holds the whole vocabulary."""
    return values[None]


class DigitSearch:
    """Search for the largest key of each row up to which, from the top, there is a share of weight.

    Each pass sums the weights by the next 8 bits of the keys, and the next one looks only at the
    keys with the bits where the share is reached. The bit patterns of floats, those of negative
    ones turned round and all counted from the lowest, order like the values: such bits are a key.

    Args:
        rows: n.
        device: Of the sums.
        top_p: The share.
        gather: Over the ranks.
        needed: [n] float64, the weight up to there, all that there is if that is less; None: that
            share of all.

    Attributes:
        prefix: [n, 1] int64, the bits found so far.
    """

    def __init__(
        self,
        rows: int,
        device: torch.device,
        top_p: float,
        gather: Gather,
        needed: Tensor | None = None,
    ) -> None:
        self.prefix = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._top_p, self._gather = top_p, gather
        self._above = torch.zeros(rows, 1, dtype=torch.float64, device=device)
        self._needed = None if needed is None else needed[:, None]

    def advance(self, sums: Tensor) -> Tensor:
        """The digit [n, 1] where the share is reached, from this rank's sums [n, 256] by digit."""
        descending = self._gather(sums).sum(dim=0).flip(-1)
        reached = self._above + descending.cumsum(dim=-1)
        if self._needed is None:
            self._needed = self._top_p * reached[:, -1:]
        last = sums.shape[1] - 1
        # For p close to 1, sums of another order may not come up to what is needed.
        needed = self._needed.minimum(reached[:, -1:])
        passed = (reached < needed).sum(dim=-1, keepdim=True).clamp_(max=last)
        self._above = reached.gather(1, passed) - descending.gather(1, passed)
        digit = last - passed
        self.prefix = (self.prefix << DIGIT_BITS) | digit
        return digit

    def values(self, key_bits: int) -> Tensor:
        """Values [n] float32 whose `key_bits` highest bits have been found."""
        keys = (self.prefix[:, 0] << (_KEY_BITS - key_bits)) - (1 << (_KEY_BITS - 1))
        # Negative ones turn round again, but for the bits that their type does not have.
        turned = 0x7FFFFFFF >> (_KEY_BITS - key_bits) << (_KEY_BITS - key_bits)
        bits = keys ^ ((keys >> (_KEY_BITS - 1)) & turned)
        return bits.int().view(torch.float32)


def top_p_threshold(
    logits: Tensor,
    top: Tensor,
    temperature: float,
    top_p: float,
    floor: Tensor | None,
    gather: Gather,
) -> Tensor:
    """The lowest logit in the smallest set of most likely tokens with mass >= p.

    Args:
        logits: [n, v].
        top: [n], largest logit over all ranks.
        temperature: Above 0.
        top_p: Below 1.
        floor: [n], lower logits are left out before; None: none are.
        gather: Over the ranks.

    Returns:
        [n] float32.
    """
    thresholds = []
    at_a_time = max(1, _SEARCHED_LOGITS // logits.shape[1])
    # Memory of its own for each row would cost more than what is computed in it.
    buffers = logits.new_empty(3, min(at_a_time, len(logits)), logits.shape[1], dtype=torch.float32)
    for start in range(0, len(logits), at_a_time):
        rows = slice(start, start + at_a_time)
        values = logits[rows].float()
        distance, weights, kept = buffers[:, : len(values)]
        torch.sub(values, top[rows, None], out=distance)
        torch.mul(distance, 1.0 / temperature, out=weights).exp_()
        if floor is not None:
            weights.mul_(torch.ge(values, floor[rows, None], out=kept))
        found = radix_search(values, weights, distance, temperature, top_p, gather)
        thresholds.append(found)
    return torch.cat(thresholds)


def radix_search(
    values: Tensor,
    weights: Tensor,
    distance: Tensor,
    temperature: float,
    top_p: float,
    gather: Gather = only_rank,
    needed: Tensor | None = None,
) -> Tensor:
    """The lowest of the largest values of each row that have a share of its weight together.

    Args:
        values: [n, v] float32.
        weights: [n, v] float32.
        distance: [n, v] float32, values less the largest of the row; it is overwritten.
        temperature: Of the weights, above 0.
        top_p: The share.
        gather: Over the ranks.
        needed: See `DigitSearch`.

    Returns:
        [n] float32.
    """
    n, size = len(values), 1 << DIGIT_BITS
    # Tokens further from the top than this hold less than 1 - p together: the last bin seldom
    # has the threshold.
    reach = temperature * (LOG_VOCABULARY - math.log1p(-top_p))
    digits = distance.mul_(size / reach).add_(size - 1).clamp_(min=0).int().clamp_(0, size - 1)
    search = DigitSearch(n, values.device, top_p, gather, needed)
    rows = torch.zeros(1, dtype=torch.int64, device=values.device)
    if n > 1:
        rows = torch.arange(n, device=values.device)[:, None].expand(values.shape).flatten()
    keys = values.contiguous().view(torch.int32).flatten()
    digits, weights = digits.flatten(), weights.flatten().double()
    for shift in (_KEY_BITS, *range(_KEY_BITS - DIGIT_BITS, -1, -DIGIT_BITS)):
        if shift < _KEY_BITS:
            # Two's complement: among these digits, those of negative keys are the larger ones.
            flip = size // 2 if shift == _KEY_BITS - DIGIT_BITS else 0
            digits = ((keys >> shift) & (size - 1)).bitwise_xor_(flip)
        bins = rows * size + digits if n > 1 else digits
        sums = torch.bincount(bins, weights, minlength=n * size)
        wanted = search.advance(sums.double().view(n, size))[:, 0].int()
        kept = (digits == wanted[rows]).nonzero()[:, 0]
        keys, weights = keys[kept], weights[kept]
        rows = rows[kept] if n > 1 else rows
        if shift == _KEY_BITS:
            search.prefix.zero_()
            keys = keys ^ ((keys >> (_KEY_BITS - 1)) & 0x7FFFFFFF)
    return search.values(_KEY_BITS)
