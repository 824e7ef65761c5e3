"""Megatron's layer; the last one of a model goes on with the tokens whose output is read.

S: tokens of the packed row; n: those of them that are read; h: hidden size.
"""

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class DiffusionLayer(TransformerLayer):
    """A `TransformerLayer` whose `context_mask` holds the tokens that are read, [n], or nothing.

    All tokens are keys of the last layer's attention, but what comes after it is of a token alone.
    Megatron hands this argument on to every layer, in recomputation too, and needs it for
    cross-attention only, which no model here has.
    """

    def _forward_attention(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Attention and its residual connection, [n, 1, h] where tokens are chosen."""
        hidden, context = super()._forward_attention(*args, **kwargs)
        read = kwargs.get("context_mask")
        if read is not None and self.layer_number == self.config.num_layers:
            hidden = hidden.index_select(0, read)
        return hidden, context
