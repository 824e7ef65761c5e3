"""Draw tokens by inverse CDF over whole rows of logits, for a small vocabulary on the CPU.

The same draws as those of `block_draws`, up to rounding, in one loop (`megatron_dlm.cpu_loops`):
of few logits, starting an operation takes longer than what it computes.

n: tokens drawn at once; v: columns of the vocabulary.
"""

import torch
from torch import Tensor

from megatron_dlm.cpu_loops.library import loops_for

MOST_COLUMNS = 1024
"""Columns up to which this is faster than blocks."""

MOST_LOGITS = 1 << 16
"""Logits drawn from at once: what is computed from them stays in cache."""

_COLUMNS_OF_SUM = 64
"""Columns of a row whose weights are summed apart."""


def draw_from_rows(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Draw one token for each row of logits.

    Args:
        logits: [n, v] float32; what must not be drawn has the lowest value of it.
        uniforms: [n] float64 in [0, 1).
        temperature: 0 takes the most likely token, the lowest id among equals; so does a row
            without a finite sum of probabilities.

    Returns:
        Token ids, their probabilities at temperature 1, and the entropy in nats of that
        distribution, [3, n] float64.
    """
    drawn = torch.empty(3, len(logits), dtype=torch.float64)
    rows, columns = logits.shape
    loops_for(torch.float32).draw_from_rows(
        logits.contiguous(),
        uniforms.contiguous(),
        rows,
        columns,
        temperature,
        logits.new_empty(columns),
        drawn.new_empty(-(-columns // _COLUMNS_OF_SUM)),
        _COLUMNS_OF_SUM,
        drawn,
    )
    return drawn
