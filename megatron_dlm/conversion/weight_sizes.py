"""Compare the sizes in config.json with the shapes of the weights, before a model is built.

Shapes are in the headers of files, so this reads no weights and needs no PyTorch. A size that no
tensor has is an error in config.json. If only some tensors differ, the later comparison of all
shapes names the tensor.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.models.architecture import Architecture

Shape = tuple[int, ...]

_REMEDY = "use a config.json and weights that belong together"


@dataclass(frozen=True)
class SizeRow:
    """Where a size shows in the weights.

    Attributes:
        key: Key of config.json.
        tensors: Regular expression of the names of tensors with this size.
        dimension: Dimension of these tensors.
        expected: Size according to config.json.
    """

    key: str
    tensors: str
    dimension: int
    expected: Callable[[Architecture], int | None]


_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_ATTENTION = r"model\.layers\.\d+\.self_attn\."
_MLP = r"model\.layers\.\d+\.mlp\."

HF_SIZES = (
    SizeRow("vocab_size", r"model\.embed_tokens\.weight", 0, lambda a: a.vocab_size),
    SizeRow("hidden_size", r"model\.(embed_tokens|norm)\.weight", -1, lambda a: a.hidden_size),
    SizeRow(
        "num_attention_heads",
        rf"{_ATTENTION}q_proj\.weight",
        0,
        lambda a: a.num_attention_heads * a.kv_channels,
    ),
    SizeRow(
        "num_key_value_heads",
        rf"{_ATTENTION}[kv]_proj\.weight",
        0,
        lambda a: a.num_query_groups * a.kv_channels,
    ),
)
"""Rows of Hugging Face checkpoints."""

HF_DENSE_SIZES = (
    SizeRow("intermediate_size", rf"{_MLP}(gate|up)_proj\.weight", 0, lambda a: a.ffn_hidden_size),
)

HF_MOE_SIZES = (
    SizeRow("num_experts", rf"{_MLP}gate\.weight", 0, lambda a: a.num_moe_experts),
    SizeRow(
        "moe_intermediate_size",
        rf"{_MLP}experts\.\d+\.(gate|up)_proj\.weight",
        0,
        lambda a: a.moe_ffn_hidden_size,
    ),
)

_DECODER = r"decoder\.layers\."

# The first dimension of these tensors is the layer, the second one of experts the expert.
MEGATRON_SIZES = (
    SizeRow(
        "num_hidden_layers",
        rf"{_DECODER}self_attention\.linear_proj\.weight",
        0,
        lambda a: a.num_layers,
    ),
    SizeRow("hidden_size", r"decoder\.final_layernorm\.weight", 0, lambda a: a.hidden_size),
    SizeRow(
        "num_attention_heads",
        rf"{_DECODER}self_attention\.linear_proj\.weight",
        2,
        lambda a: a.num_attention_heads * a.kv_channels,
    ),
    SizeRow(
        "num_key_value_heads",
        rf"{_DECODER}self_attention\.linear_qkv\.weight",
        1,
        lambda a: (a.num_attention_heads + 2 * a.num_query_groups) * a.kv_channels,
    ),
)
"""Rows of Megatron checkpoints, whose vocabulary is padded."""

MEGATRON_DENSE_SIZES = (
    SizeRow(
        "intermediate_size", rf"{_DECODER}mlp\.linear_fc2\.weight", 2, lambda a: a.ffn_hidden_size
    ),
)

MEGATRON_MOE_SIZES = (
    SizeRow("num_experts", rf"{_DECODER}mlp\.router\.weight", 1, lambda a: a.num_moe_experts),
    SizeRow(
        "moe_intermediate_size",
        rf"{_DECODER}mlp\.experts\.experts\.linear_fc2\.weight",
        3,
        lambda a: a.moe_ffn_hidden_size,
    ),
)


def check_hf_sizes(architecture: Architecture, shapes: Mapping[str, Shape], weights: str) -> None:
    """Compare config.json with the tensors of a Hugging Face checkpoint.

    Args:
        architecture: Read from config.json.
        shapes: Shapes of all tensors.
        weights: Path of the weights, for error messages.

    Raises:
        UserError: A size differs from the weights, or the output layer is missing.
    """
    layers = {int(found[1]) for name in shapes if (found := _HF_LAYER.match(name))}
    if layers and max(layers) + 1 != architecture.num_layers:
        problem = f"but the weights in {weights} have {max(layers) + 1} layers"
        raise _refuse(architecture, "num_hidden_layers", problem)
    _check_kind(architecture, any(".mlp.experts." in name for name in shapes), weights)
    _check_head_size(architecture, shapes, weights, HF_SIZES)
    by_kind = HF_MOE_SIZES if architecture.is_moe else HF_DENSE_SIZES
    _check(architecture, shapes, weights, (*HF_SIZES, *by_kind))
    if not architecture.tie_word_embeddings and "lm_head.weight" not in shapes:
        problem = f"but {weights} has no lm_head.weight"
        raise _refuse(architecture, "tie_word_embeddings", problem)


def check_megatron_sizes(
    architecture: Architecture, shapes: Mapping[str, Shape], weights: str
) -> None:
    """Compare config.json with the tensors of a Megatron checkpoint; see `check_hf_sizes`."""
    _check_kind(architecture, any(".mlp.experts." in name for name in shapes), weights)
    _check_head_size(architecture, shapes, weights, MEGATRON_SIZES)
    by_kind = MEGATRON_MOE_SIZES if architecture.is_moe else MEGATRON_DENSE_SIZES
    _check(architecture, shapes, weights, (*MEGATRON_SIZES, *by_kind))
    if architecture.tie_word_embeddings == ("output_layer.weight" in shapes):
        has = "has" if architecture.tie_word_embeddings else "has no"
        problem = f"but {weights} {has} output_layer.weight"
        raise _refuse(architecture, "tie_word_embeddings", problem)
    rows = shapes.get("embedding.word_embeddings.weight", (0,))[0]
    if architecture.vocab_size > rows:
        problem = f"but the embeddings in {weights} have {rows} rows"
        raise _refuse(architecture, "vocab_size", problem)


def _check_kind(architecture: Architecture, has_experts: bool, weights: str) -> None:
    if architecture.is_moe != has_experts:
        problem = f"but {weights} holds {'experts' if has_experts else 'no experts'}"
        raise _refuse(architecture, "model_type", problem)


def _check_head_size(
    architecture: Architecture,
    shapes: Mapping[str, Shape],
    weights: str,
    rows: tuple[SizeRow, ...],
) -> None:
    """Compare head_dim: with a wrong one, the rows of all heads are off by the same factor."""
    ratios: dict[float, str] = {}
    for row in rows:
        if row.key not in ("num_attention_heads", "num_key_value_heads"):
            continue
        expected = row.expected(architecture)
        assert expected is not None
        for name in shapes:
            if re.fullmatch(row.tensors, name):
                ratios[(_dimension(shapes[name], row.dimension) or 0) / expected] = name
    if len(ratios) == 1 and 1.0 not in ratios:
        (tensor,) = ratios.values()
        problem = f"but {tensor} in {weights} has shape {list(shapes[tensor])}"
        raise _refuse(architecture, "head_dim", problem)


def _check(
    architecture: Architecture,
    shapes: Mapping[str, Shape],
    weights: str,
    rows: tuple[SizeRow, ...],
) -> None:
    for row in rows:
        pattern = re.compile(row.tensors)
        tensors = [name for name in shapes if pattern.fullmatch(name)]
        expected = row.expected(architecture)
        if tensors and all(_dimension(shapes[name], row.dimension) != expected for name in tensors):
            problem = f"but {tensors[0]} in {weights} has shape {list(shapes[tensors[0]])}"
            raise _refuse(architecture, row.key, problem)


def _dimension(shape: Shape, dimension: int) -> int | None:
    return shape[dimension] if len(shape) > dimension and shape else None


def _refuse(architecture: Architecture, key: str, problem: str) -> UserError:
    stated = architecture.hf_config.get(key)
    return bad_value(f"{architecture.file}: {key}", stated, problem, _REMEDY)
