"""The Hugging Face tensors of each Megatron parameter, under the names that most families have.

Megatron's names are those of the whole model: layers and experts are counted globally. A family
with other tensor names, or other fused tensors, has its own table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_dlm.models.parameter_layout import (
    GateUp,
    ParameterLayout,
    QueryKeyValue,
    Replicated,
    RowParallel,
    Vocabulary,
)

if TYPE_CHECKING:
    from megatron_dlm.models.architecture import Architecture

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class ParameterMapping:
    """One Megatron parameter and the Hugging Face tensors it is made of.

    Attributes:
        megatron: Name in the whole Megatron model.
        hf: Names and shapes of the tensors, in the order that `layout` expects.
        layout: Converts them to a rank's shard and back.
        transformer_engine: Name under the Transformer Engine spec, where it differs: norms are
            fused into the linear layer that follows them.
    """

    megatron: str
    hf: dict[str, Shape]
    layout: ParameterLayout
    transformer_engine: str | None = None

    @property
    def is_of_expert(self) -> bool:
        """Whether it is a part of one of a layer's experts."""
        return ".local_experts." in self.megatron


def llama_parameters(architecture: Architecture) -> list[ParameterMapping]:
    """All parameters of a model with tensor names of Llama and, for experts, of Qwen3-MoE.

    A tied output layer is read from the embedding tensor.
    """
    a = architecture
    vocabulary, h = (a.vocab_size, a.hidden_size), a.hidden_size
    head = EMBEDDING if a.tie_word_embeddings else HEAD
    table = [
        ParameterMapping(
            "embedding.word_embeddings.weight", {EMBEDDING: vocabulary}, Vocabulary(a.vocab_size)
        )
    ]
    for layer in range(a.num_layers):
        table.extend(_attention(a, layer))
        table.extend(_experts(a, layer) if a.is_moe else _dense_mlp(a, layer))
    table += [
        ParameterMapping(
            "decoder.final_layernorm.weight", {"model.norm.weight": (h,)}, Replicated()
        ),
        ParameterMapping("output_layer.weight", {head: vocabulary}, Vocabulary(a.vocab_size)),
    ]
    return table


def _attention(a: Architecture, layer: int) -> Iterator[ParameterMapping]:
    m, hf, h, d = f"decoder.layers.{layer}", f"model.layers.{layer}", a.hidden_size, a.kv_channels
    q, kv = a.num_attention_heads * d, a.num_query_groups * d
    yield ParameterMapping(
        f"{m}.input_layernorm.weight",
        {f"{hf}.input_layernorm.weight": (h,)},
        Replicated(),
        transformer_engine=f"{m}.self_attention.linear_qkv.layer_norm_weight",
    )
    projections = {
        f"{hf}.self_attn.{name}_proj": rows for name, rows in (("q", q), ("k", kv), ("v", kv))
    }
    interleaved = QueryKeyValue(a.num_attention_heads // a.num_query_groups, d)
    yield ParameterMapping(
        f"{m}.self_attention.linear_qkv.weight",
        {f"{name}.weight": (rows, h) for name, rows in projections.items()},
        interleaved,
    )
    if a.qkv_bias:
        yield ParameterMapping(
            f"{m}.self_attention.linear_qkv.bias",
            {f"{name}.bias": (rows,) for name, rows in projections.items()},
            interleaved,
        )
    if a.qk_norm:
        for name in ("q", "k"):
            yield ParameterMapping(
                f"{m}.self_attention.{name}_layernorm.weight",
                {f"{hf}.self_attn.{name}_norm.weight": (d,)},
                Replicated(),
            )
    yield ParameterMapping(
        f"{m}.self_attention.linear_proj.weight",
        {f"{hf}.self_attn.o_proj.weight": (h, q)},
        RowParallel(),
    )


def _pre_mlp_layernorm(a: Architecture, layer: int) -> ParameterMapping:
    # A mixture of experts keeps the norm on its own: its output goes to the router as well.
    fused = None if a.is_moe else f"decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight"
    return ParameterMapping(
        f"decoder.layers.{layer}.pre_mlp_layernorm.weight",
        {f"model.layers.{layer}.post_attention_layernorm.weight": (a.hidden_size,)},
        Replicated(),
        transformer_engine=fused,
    )


def _feed_forward(m: str, hf: str, h: int, f: int) -> Iterator[ParameterMapping]:
    yield ParameterMapping(
        f"{m}.linear_fc1.weight",
        {f"{hf}.gate_proj.weight": (f, h), f"{hf}.up_proj.weight": (f, h)},
        GateUp(),
    )
    yield ParameterMapping(
        f"{m}.linear_fc2.weight", {f"{hf}.down_proj.weight": (h, f)}, RowParallel()
    )


def _dense_mlp(a: Architecture, layer: int) -> Iterator[ParameterMapping]:
    m, hf = f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.mlp"
    yield _pre_mlp_layernorm(a, layer)
    yield from _feed_forward(m, hf, a.hidden_size, a.ffn_hidden_size)


def _experts(a: Architecture, layer: int) -> Iterator[ParameterMapping]:
    m, hf = f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.mlp"
    assert a.num_moe_experts is not None
    assert a.moe_ffn_hidden_size is not None
    yield _pre_mlp_layernorm(a, layer)
    yield ParameterMapping(
        f"{m}.router.weight",
        {f"{hf}.gate.weight": (a.num_moe_experts, a.hidden_size)},
        Replicated(),
    )
    for expert in range(a.num_moe_experts):
        yield from _feed_forward(
            f"{m}.experts.local_experts.{expert}",
            f"{hf}.experts.{expert}",
            a.hidden_size,
            a.moe_ffn_hidden_size,
        )


def hf_tensor_shapes(mappings: list[ParameterMapping]) -> dict[str, Shape]:
    """Names and shapes of all tensors of the Hugging Face checkpoint, each once, in model order."""
    return {name: shape for mapping in mappings for name, shape in mapping.hf.items()}
