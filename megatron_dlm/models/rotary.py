"""Frequencies of rotary embeddings scaled to longer texts, as in transformers.

Megatron-Core's own `llama3` scaling has the constants of one model, and its `yarn` no
`attention_factor`. d: size of a head; f: frequency in radians a token, [d / 2] float32.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def scaled_frequencies(scaling: Mapping[str, Any] | None, base: float, head_size: int) -> Tensor:
    """Frequencies [d / 2]: f or, with a scaling, a mixture of f (kept) and f / factor (stretched).

    Args:
        scaling: Its keys in config.json, `rope_type` among them; None for no scaling.
        base: Base of f.
        head_size: d.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    frequencies = 1.0 / base**exponents
    if scaling is None or scaling["rope_type"] == "default":
        return frequencies
    kept = {"llama3": _kept_by_llama3, "yarn": _kept_by_yarn}[scaling["rope_type"]]
    share = kept(scaling, frequencies, base, head_size)
    return frequencies / scaling["factor"] * (1.0 - share) + frequencies * share


def _kept_by_llama3(
    scaling: Mapping[str, Any], frequencies: Tensor, base: float, head_size: int
) -> Tensor:
    """Share kept, by the number of periods in the original context length (llama3)."""
    periods = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    return ((periods - low) / (high - low)).clamp(0.0, 1.0)


def _kept_by_yarn(
    scaling: Mapping[str, Any], frequencies: Tensor, base: float, head_size: int
) -> Tensor:
    """Share kept, by the channel's place between those with beta_fast and beta_slow periods.

    Peng et al. 2023, Section 3.2, with the ramp over channels instead of periods, as its code does.
    """
    original = scaling["original_max_position_embeddings"]

    def channel(periods: float) -> float:
        return head_size * math.log(original / (periods * 2 * math.pi)) / (2 * math.log(base))

    first, last = channel(scaling.get("beta_fast", 32)), channel(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_size - 1)
    if first == last:
        last += 0.001
    channels = torch.arange(head_size // 2, dtype=torch.float32)
    return 1.0 - ((channels - first) / (last - first)).clamp(0.0, 1.0)


def attention_factor(scaling: Mapping[str, Any] | None) -> float:
    """Factor of a scaling on queries and on keys: scores grow by its square.

    Args:
        scaling: `Architecture.rope_scaling`.
    """
    if scaling is None or scaling["rope_type"] != "yarn":
        return 1.0
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    factor = scaling["factor"]

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)
