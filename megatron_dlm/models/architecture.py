"""The architecture of a model, read from a Hugging Face `config.json`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_dlm.errors import UserError, bad_value

DENSE_MODEL_TYPES = ("qwen3", "sdar", "a2d-qwen3")
MOE_MODEL_TYPES = ("qwen3_moe", "sdar_moe", "rnd1")


@dataclass(frozen=True)
class DiffusionConvention:
    """How a diffusion model attends and which token its logits predict; part of its config.json.

    Attributes:
        attention_pattern: `block_causal`, `full` (bidirectional over the whole sequence), or
            `causal` (each token sees those before it; shifted only). A causal diffusion model is a
            stage of training: it is decoded from left to right, like an autoregressive one.
        shifted: Whether logits at position i predict token i + 1 (RND1) instead of token i.
    """

    attention_pattern: Literal["block_causal", "full", "causal"]
    shifted: bool


BLOCK_DIFFUSION = DiffusionConvention("block_causal", shifted=False)
RND1 = DiffusionConvention("full", shifted=True)

_CONVENTION_OF_MODEL_TYPE = {
    "sdar": BLOCK_DIFFUSION,
    "sdar_moe": BLOCK_DIFFUSION,
    "a2d-qwen3": DiffusionConvention("full", shifted=False),
    "rnd1": RND1,
}


def diffusion_convention(
    hf_config: Mapping[str, Any], where: str = "config.json"
) -> DiffusionConvention | None:
    """The convention that a config.json states; None for an autoregressive model.

    `attention_pattern` and `shifted` say it; for one that is left out the model type does, and a
    `block_size` makes any other type a block-diffusion model.

    Raises:
        UserError: `attention_pattern` or `shifted` has an unknown value, or `shifted` stands alone.
    """
    implied = _CONVENTION_OF_MODEL_TYPE.get(hf_config.get("model_type", ""))
    if implied is None and "block_size" in hf_config:
        implied = BLOCK_DIFFUSION
    if implied is None and not {"attention_pattern", "shifted"} & hf_config.keys():
        return None
    pattern = hf_config.get("attention_pattern", implied and implied.attention_pattern)
    shifted = hf_config.get("shifted", implied is not None and implied.shifted)
    if not isinstance(shifted, bool):
        raise bad_value(f"{where}: shifted", shifted, "is no boolean", "write true or false")
    if pattern == "causal" and not shifted:
        raise bad_value(
            f"{where}: attention_pattern",
            pattern,
            "is what no diffusion model of unshifted logits has",
            "add shifted: true, or write block_causal or full",
        )
    if pattern not in ("block_causal", "full", "causal"):
        raise bad_value(
            f"{where}: attention_pattern", pattern, "is unknown", "write block_causal or full"
        )
    return DiffusionConvention(pattern, shifted)


@dataclass(frozen=True)
class Architecture:
    """What has to be known to build a Qwen3 or Qwen3-MoE model; sizes in elements.

    `hf_config` is the `config.json` it was read from, kept whole for export.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    rotary_base: float
    tie_word_embeddings: bool
    initializer_range: float
    hf_config: dict[str, Any]
    num_moe_experts: int | None = None
    moe_router_topk: int | None = None
    moe_ffn_hidden_size: int | None = None
    norm_topk_prob: bool = True

    @property
    def is_moe(self) -> bool:
        """Whether the feed-forward layers are mixtures of experts."""
        return self.num_moe_experts is not None


def active_parameters(architecture: Architecture) -> int:
    """Parameters that a token meets: all of a dense model, of experts the router's choice."""
    hidden, head = architecture.hidden_size, architecture.kv_channels
    heads, groups = architecture.num_attention_heads, architecture.num_query_groups
    attention = hidden * head * (2 * heads + 2 * groups) + 2 * head
    if architecture.num_moe_experts is None:
        mlp = 3 * hidden * architecture.ffn_hidden_size
    else:
        chosen, units = architecture.moe_router_topk, architecture.moe_ffn_hidden_size
        assert chosen is not None
        assert units is not None
        mlp = 3 * hidden * units * chosen + hidden * architecture.num_moe_experts
    tables = 1 if architecture.tie_word_embeddings else 2
    layer = attention + mlp + 2 * hidden
    return architecture.num_layers * layer + hidden + tables * architecture.vocab_size * hidden


def _check_supported(config: dict[str, Any], where: str) -> None:
    def refuse(key: str, remedy: str) -> UserError:
        return bad_value(f"{where}: {key}", config[key], "is not supported", remedy)

    supported = DENSE_MODEL_TYPES + MOE_MODEL_TYPES
    if config.get("model_type") not in supported:
        raise bad_value(
            f"{where}: model_type",
            config.get("model_type"),
            "is not a supported architecture",
            f"use one of {', '.join(supported)}",
        )
    if config.get("attention_bias"):
        raise refuse("attention_bias", "use a checkpoint without attention biases")
    if config.get("use_sliding_window"):
        raise refuse("use_sliding_window", "use a checkpoint with global attention")
    if config.get("hidden_act", "silu") != "silu":
        raise refuse("hidden_act", "use a checkpoint with SwiGLU (silu)")
    if config.get("mlp_only_layers"):
        raise refuse("mlp_only_layers", "use a checkpoint whose layers are all mixtures of experts")
    if config.get("decoder_sparse_step", 1) != 1:
        raise refuse("decoder_sparse_step", "use a checkpoint with decoder_sparse_step 1")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise bad_value(
            f"{where}: rope_scaling", scaling, "is not supported", "use the unscaled checkpoint"
        )


def architecture_from_hf(config: dict[str, Any], where: str = "config.json") -> Architecture:
    """Read an architecture from a parsed `config.json`.

    Args:
        config: The JSON object.
        where: Name of the file for error messages.

    Raises:
        UserError: A field is missing or asks for something that is not supported.
    """
    _check_supported(config, where)
    rope = config.get("rope_parameters") or {}
    is_moe = config["model_type"] in MOE_MODEL_TYPES
    if "num_local_experts" in config:  # how transformers 5 writes it
        config = {"num_experts": config["num_local_experts"], **config}
    try:
        num_attention_heads = config["num_attention_heads"]
        return Architecture(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=num_attention_heads,
            num_query_groups=config.get("num_key_value_heads", num_attention_heads),
            kv_channels=config.get("head_dim") or config["hidden_size"] // num_attention_heads,
            vocab_size=config["vocab_size"],
            max_position_embeddings=config["max_position_embeddings"],
            layernorm_epsilon=config["rms_norm_eps"],
            rotary_base=config["rope_theta"] if "rope_theta" in config else rope["rope_theta"],
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            initializer_range=config.get("initializer_range", 0.02),
            hf_config=config,
            num_moe_experts=config["num_experts"] if is_moe else None,
            moe_router_topk=config["num_experts_per_tok"] if is_moe else None,
            moe_ffn_hidden_size=config["moe_intermediate_size"] if is_moe else None,
            norm_topk_prob=config.get("norm_topk_prob", False) if is_moe else True,
        )
    except KeyError as error:
        raise bad_value(
            where, error.args[0], "this key is missing", "use a complete Hugging Face config.json"
        ) from error


def read_architecture(path: str | Path, field: str = "--load") -> Architecture:
    """Read the architecture from a `config.json` or the folder that holds it.

    Args:
        path: File or folder.
        field: What the user named the path with, for error messages.

    Raises:
        UserError: There is no such file, it is no JSON object, or it is not supported.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    if not file.is_file():
        raise bad_value(field, str(path), f"there is no {file}", "name a Hugging Face model folder")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise bad_value(
            field, str(file), f"is not valid JSON (line {error.lineno})", "repair the file"
        ) from error
    if not isinstance(config, dict):
        raise bad_value(
            field, str(file), "is no JSON object", "use a complete Hugging Face config.json"
        )
    return architecture_from_hf(config, where=str(file))
