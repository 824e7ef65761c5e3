"""Draw tokens by inverse CDF over whole rows of logits, for a small vocabulary on the CPU.

The same draws as those of `block_draws`, up to rounding, in a third of the operations: of few
logits, starting an operation takes longer than what it computes.

n: tokens drawn at once; v: columns of the vocabulary.
"""

import torch
from torch import Tensor

MOST_COLUMNS = 1024
"""Columns up to which this is faster than blocks."""

MOST_LOGITS = 1 << 16
"""Logits drawn from at once: what is computed from them stays in cache."""


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
    top = logits.amax(dim=-1, keepdim=True)
    best = None if temperature else logits.argmax(dim=-1, keepdim=True)
    # A logit above 1e31 would leave minus infinity, and no entropy.
    shifted = (logits - top).clamp_(min=torch.finfo(logits.dtype).min)
    weights = shifted.exp()
    if best is not None:
        column = best
    else:
        tempered = weights if temperature == 1.0 else (shifted / temperature).exp_()
        reached = tempered.cumsum(dim=-1, dtype=torch.float64)
        total = reached[:, -1:]
        # Below the total also where the product is rounded.
        target = (uniforms[:, None] * total).minimum(total.nextafter(torch.zeros_like(total)))
        column = torch.searchsorted(reached, target, right=True)
        is_regular = total.isfinite() & (total > 0.0)
        if not is_regular.all():
            column = torch.where(is_regular, column, logits.argmax(dim=-1, keepdim=True))
    log_probability = shifted.gather(1, column)[:, 0].double()
    mass = weights.sum(dim=-1).double()
    moment = weights.mul_(shifted).sum(dim=-1).double()
    log_mass = mass.log()
    confidence = (log_probability - log_mass).exp()
    entropy = (log_mass - moment / mass).clamp_(min=0.0)
    return torch.stack((column[:, 0].double(), confidence, entropy))
