"""FLOPs that a model needs, by formula: no more than its products, counted once.

A product of [m, k] and [k, n] is 2 m k n. What is not useful is not counted: padding, attention to
pairs that are not visible, experts that the router did not choose, activations computed again, and
elementwise work (a hundredth).
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_dlm.models.architecture import Architecture
from megatron_dlm.models.attention_layout import visible_counts

BACKWARD = 2
"""Products of a backward pass for one of the forward: gradients of its input and of its weight."""


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of a forward pass of the whole model.

    Attributes:
        per_token: Of the layers' projections; of experts, those that a token is routed to.
        per_pair: Of scores and context of a visible pair of query and key.
        per_logits: Of the output layer at one token.
        feed_forward: Of one layer's feed-forward part at one token, a part of `per_token`.
    """

    per_token: int
    per_pair: int
    per_logits: int
    feed_forward: int

    @classmethod
    def of(cls, architecture: Architecture) -> "ForwardFlops":
        """Those of an architecture."""
        a = architecture
        heads, groups, size = a.num_attention_heads, a.num_query_groups, a.kv_channels
        attention = a.hidden_size * size * (2 * heads + 2 * groups)
        if a.is_moe:
            assert a.num_moe_experts is not None
            assert a.moe_router_topk is not None
            assert a.moe_ffn_hidden_size is not None
            router = a.hidden_size * a.num_moe_experts
            mlp = router + a.moe_router_topk * 3 * a.hidden_size * a.moe_ffn_hidden_size
        else:
            mlp = 3 * a.hidden_size * a.ffn_hidden_size
        return cls(
            per_token=2 * a.num_layers * (attention + mlp),
            per_pair=2 * a.num_layers * 2 * heads * size,
            per_logits=2 * a.hidden_size * a.vocab_size,
            feed_forward=2 * mlp,
        )

    def forward(self, tokens: int, pairs: int, logits: int, read: int | None = None) -> int:
        """FLOPs of forward passes over so many tokens, visible pairs and tokens with logits.

        Args:
            tokens: Tokens.
            pairs: Pairs of a query and a key that it sees.
            logits: Tokens whose logits are computed.
            read: Tokens whose hidden states are read, where the last layer's feed-forward part
                leaves out the others (`models.layer`); None: all.
        """
        left_out = 0 if read is None else (tokens - read) * self.feed_forward
        return tokens * self.per_token + pairs * self.per_pair + logits * self.per_logits - left_out


def visible_pairs(layout: Tensor) -> int:
    """Pairs of a query and a key that it sees.

    Args:
        layout: [4, S], [5, S] or, with annealed attention, [6, S] (`attention_layout`).
    """
    return int(visible_counts(layout).sum())


def causal_pairs(length: int) -> int:
    """Visible pairs of one document under causal attention."""
    return length * (length + 1) // 2
