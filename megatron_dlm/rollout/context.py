"""Attention of a rollout's forwards: against a KV cache, or within the forward."""

from typing import Protocol

import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.models.attention import CachedAttention
from megatron_dlm.models.attention_layout import clean_layout, pad_layout
from megatron_dlm.models.forward import decoding_multiple
from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.kv_cache import CacheView, KVCache


class RolloutContext(Protocol):
    """Attention of the sequences in decoding, for one call of the engine."""

    def attention(self, starts: Tensor, ends: Tensor) -> Tensor | CachedAttention:
        """Attention of a forward over positions starts[r] to ends[r] - 1 of each slot r.

        Without slots: attention of a row with one token that belongs to no sequence.

        Args:
            starts: [R] int64 on the CPU.
            ends: [R] int64 on the CPU.
        """

    def move(self, source: int, target: int) -> None:
        """Move the sequence of slot `source` to slot `target`."""


class CachedContext:
    """Block-causal or causal attention against cached keys.

    Args:
        model: This rank's part of the model.
        tp_size: Tensor-parallel ranks that share its heads.
        num_slots: Sequences held at once.
        max_length: Positions of each.
        block_size: Tokens of a block of the visibility rule; 1 is causal.
    """

    def __init__(
        self,
        model: DiffusionGPTModel,
        *,
        tp_size: int,
        num_slots: int,
        max_length: int,
        block_size: int,
    ) -> None:
        config = model.config
        layers = model.decoder.layers
        self._block_size = block_size
        self._cache = KVCache(
            num_layers=len(layers),
            first_layer_number=layers[0].layer_number,
            num_slots=num_slots,
            max_length=max_length,
            num_attention_heads_per_partition=config.num_attention_heads // tp_size,
            num_query_groups_per_partition=config.num_query_groups // tp_size,
            head_size=config.kv_channels,
            dtype=config.params_dtype,
            device=platform.device(),
        )

    def attention(self, starts: Tensor, ends: Tensor) -> CacheView:
        """See `RolloutContext`; the keys of the forward's tokens are written into the cache."""
        return CacheView(self._cache, starts, ends, self._block_size)

    def move(self, source: int, target: int) -> None:
        """See `RolloutContext`."""
        self._cache.move(source, target)


class CanvasContext:
    """Full attention: every forward holds whole sequences, without a cache.

    Every committed token changes the keys of all others, so no key could be reused.

    Args:
        multiple: The length of a forward is padded to a multiple of this.
    """

    def __init__(self, multiple: int) -> None:
        self._multiple = multiple
        self._lengths: list[int] | None = None
        self._layout = torch.empty(0)

    def attention(self, starts: Tensor, ends: Tensor) -> Tensor:
        """See `RolloutContext`; a layout tensor, with the padding of the forward."""
        lengths = (ends - starts).tolist()
        # The same tensor as long as no sequence ends, so that its cached masks are reused.
        if lengths != self._lengths:
            self._lengths = lengths
            nothing = torch.empty(4, 0, dtype=torch.int32)
            layout = clean_layout(lengths, "full", 1) if lengths else pad_layout(nothing, 1)
            padded = -(-layout.shape[1] // self._multiple) * self._multiple
            self._layout = pad_layout(layout, padded).to(platform.device())
        return self._layout

    def move(self, source: int, target: int) -> None:
        """See `RolloutContext`; nothing has to move."""


def rollout_context(
    model: DiffusionGPTModel,
    generation: GenerationConfig,
    *,
    tp_size: int,
    num_slots: int,
    max_length: int,
) -> RolloutContext:
    """A new, empty context: no key in it is from older weights."""
    if generation.attention_pattern == "full":
        return CanvasContext(decoding_multiple(model))
    assert generation.block_size is not None
    return CachedContext(
        model,
        tp_size=tp_size,
        num_slots=num_slots,
        max_length=max_length,
        block_size=generation.block_size,
    )
