"""The sizes of a model, as far as options depend on them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Sizes that rules about options compare with.

    Attributes:
        num_layers: Transformer layers.
        num_attention_heads: Query heads of a layer.
        num_query_groups: Key/value heads of a layer.
        ffn_hidden_size: Inner size of a dense feed-forward layer.
        vocab_size: Vocabulary entries, without padding for tensor parallelism.
        max_position_embeddings: Longest sequence in tokens.
        num_moe_experts: Experts of a layer; None for a dense model.
        moe_ffn_hidden_size: Inner size of one expert; None for a dense model.
    """

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    num_moe_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
