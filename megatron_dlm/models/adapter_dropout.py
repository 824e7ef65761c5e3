"""Dropout on the inputs of adapters (LoRA), the same under every parallel layout.

Which inputs are dropped is a function of the token's key (a row of the micro-batch's layout), the
layer and the index of the input. There is no generator state, so the result does not depend on
packing, on the split of layers, pipeline stages or sequences, or on recomputed activations.

S: tokens of the row; s: those that a layer's input holds; f: inputs of a layer on this rank.
"""

import torch
from torch import Tensor

from megatron_dlm.models.attention_layout import DRAW_UNIT, pair_draws

MAX_DRAWS = 1 << 24
"""Most draws in memory at once; each takes several 64-bit integers."""

_SPREAD = 0x9E3779B1  # odd: indices of inputs stay different modulo 2^31


def kept_inputs(keys: Tensor, salt: int, first: int, count: int, dropout: float) -> Tensor:
    """Which inputs of a layer are kept, [s, count] bool.

    Args:
        keys: [s], keys of tokens.
        salt: Integer that stands for the layer.
        first: Index, in the whole layer, of the first input.
        count: Inputs.
        dropout: Probability that an input is dropped.
    """
    numbers = torch.arange(first, first + count, device=keys.device)
    inputs = (salt + numbers * _SPREAD) & 0x7FFFFFFF
    limit = round(dropout * DRAW_UNIT)
    step = max(1, MAX_DRAWS // max(count, 1))
    return torch.cat(
        [
            pair_draws(keys[start : start + step, None], inputs) >= limit
            for start in range(0, max(len(keys), 1), step)
        ]
    )


def drop_inputs(
    inputs: Tensor, keys: Tensor, salt: int, first: int, dropout: float, tp_rank: int
) -> Tensor:
    """Inputs [s, 1, f] of an adapter with some set to 0 and the others scaled up.

    Args:
        inputs: Of all tokens or, under sequence parallelism, of this rank's tokens.
        keys: [S] of all tokens.
        salt: Integer that stands for the layer.
        first: Index, in the whole layer, of the first input.
        dropout: Probability that an input is dropped.
        tp_rank: Index of this rank's part of the tokens, under sequence parallelism.
    """
    tokens = len(inputs)
    if tokens != len(keys):
        keys = keys[tp_rank * tokens : (tp_rank + 1) * tokens]
    kept = kept_inputs(keys, salt, first, inputs.shape[-1], dropout)[:, None]
    return torch.where(kept, inputs / (1.0 - dropout), 0.0)
