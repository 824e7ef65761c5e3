"""The architecture of a model, read from a Hugging Face `config.json`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.json_file import read_json_object
from megatron_dlm.models.config_keys import (
    CONFIG_KEYS,
    DEFAULTS,
    TOKEN_KEYS,
    checked_keys,
)
from megatron_dlm.models.families import FAMILIES, ModelType, model_types
from megatron_dlm.models.families.parameters import ParameterMapping, llama_parameters
from megatron_dlm.models.rope_scaling import read_rotary_embedding
from megatron_dlm.types.diffusion_kind import BLOCK_DIFFUSION, ContextAttention, DiffusionKind
from megatron_dlm.types.model_sizes import ModelSizes

GENERATION_CONFIG = "generation_config.json"

SGLANG_CONFIG_FILE = "dllm_config.yaml"
"""File of an `sdar` folder from which SGLang reads the block size."""


_KIND_KEYS = frozenset({"attention_pattern", "shifted", "context_attention"})


def states_attention(hf_config: Mapping[str, Any]) -> bool:
    """Whether a config.json says how the model attends: by a key of its own or by its type."""
    model_type = _model_type(hf_config)
    return (
        model_type is None
        or model_type.states_attention
        or bool({"attention_pattern", "block_size"} & hf_config.keys())
    )


def _model_type(hf_config: Mapping[str, Any]) -> ModelType | None:
    """The record of a config.json's `model_type`; None if it is unknown."""
    _, model_type = model_types().get(hf_config.get("model_type", ""), (None, None))
    return model_type


def read_diffusion_kind(
    hf_config: Mapping[str, Any], where: str = "config.json"
) -> DiffusionKind | None:
    """The kind of diffusion model in a config.json; None for an autoregressive model.

    The keys `attention_pattern`, `shifted` and `context_attention` state it. A key that is left out
    has the value that the model type implies; with `block_size`, any other type is a
    block-diffusion model.

    Raises:
        UserError: One of these keys has an unknown value, or `shifted` stands alone; or the model
            type allows either attention and nothing states which this is.
    """
    if not states_attention(hf_config):
        raise UserError(
            f"{where}: model_type = {hf_config['model_type']!r} does not say the attention; add "
            '"attention_pattern": "full" (dllm\'s mdlm) or "block_causal" with "block_size" '
            "(dllm's bd3lm, OPDLM's students) to it, or --attention-pattern to a tool's options"
        )
    model_type = _model_type(hf_config)
    implied = None if model_type is None else model_type.diffusion_kind
    if implied is None and "block_size" in hf_config:
        implied = BLOCK_DIFFUSION
    if implied is None and not _KIND_KEYS & hf_config.keys():
        return None
    pattern = hf_config.get("attention_pattern", implied and implied.attention_pattern)
    shifted = hf_config.get("shifted", implied is not None and implied.shifted)
    if not isinstance(shifted, bool):
        raise bad_value(f"{where}: shifted", shifted, "is no boolean", "write true or false")
    if pattern == "causal" and not shifted:
        raise bad_value(
            f"{where}: attention_pattern",
            pattern,
            "needs shifted logits",
            "add shifted: true, or write block_causal or full",
        )
    if pattern not in ("block_causal", "full", "causal"):
        raise bad_value(
            f"{where}: attention_pattern", pattern, "is unknown", "write block_causal or full"
        )
    blocks = implied is not None and pattern == implied.attention_pattern and not shifted
    context = implied.context_attention if implied is not None and blocks else "block_causal"
    context = hf_config.get("context_attention", context)
    return DiffusionKind(pattern, shifted, _context_attention(context, pattern, shifted, where))


def _context_attention(
    context: ContextAttention, pattern: str, shifted: bool, where: str
) -> ContextAttention:
    key = f"{where}: context_attention"
    if context not in get_args(ContextAttention):
        raise bad_value(key, context, "is unknown", "write block_causal or causal")
    if context == "causal" and (pattern != "block_causal" or shifted):
        problem = f"a model of {pattern} attention has no blocks with a context"
        if shifted:
            problem = "blocks are decoded from unshifted logits"
        raise bad_value(key, context, problem, "leave it out, or repair the other keys")
    return context


@dataclass(frozen=True, kw_only=True)
class Architecture(ModelSizes):
    """Everything needed to build a model; sizes in elements.

    `family` is its name in `models.families`. `qk_norm`: queries and keys are normalised before
    they are rotated. `qkv_bias`: the projections to queries, keys and values have biases.
    `rope_scaling` has the keys of transformers, `rope_type` among them; None: the angles are those
    of `rotary_base` alone. `hf_config` is the whole `config.json` without its nulls, kept for
    export; `generation_config` is the `generation_config.json` beside it; `file` is the path of
    `config.json`.
    """

    family: str
    hidden_size: int
    kv_channels: int
    layernorm_epsilon: float
    rotary_base: float
    rope_scaling: dict[str, Any] | None
    qk_norm: bool
    qkv_bias: bool
    tie_word_embeddings: bool
    initializer_range: float
    hf_config: dict[str, Any]
    moe_router_topk: int | None = None
    norm_topk_prob: bool = True
    generation_config: dict[str, Any] = field(default_factory=dict)
    file: str = field(default="config.json", compare=False)

    @property
    def is_moe(self) -> bool:
        """Whether the feed-forward layers are mixtures of experts."""
        return self.num_moe_experts is not None

    def ending_at(self, eos_token_ids: Sequence[int]) -> "Architecture":
        """The same model, with these ids as EOS in config.json and generation_config.json.

        Args:
            eos_token_ids: All ids that end a response.
        """
        ids = list(eos_token_ids)
        stated = {"eos_token_id": ids[0] if len(ids) == 1 else ids}
        return replace(
            self,
            hf_config=self.hf_config | stated,
            generation_config=self.generation_config | stated,
        )


def parameter_counts(architecture: Architecture) -> tuple[int, int]:
    """Parameters of a model outside its experts, and of all of its experts; tied ones once."""
    dense = experts = 0
    tables: set[str] = set()
    for mapping in parameter_mappings(architecture):
        if tables.issuperset(mapping.hf):  # a tied output layer
            continue
        tables.update(mapping.hf)
        count = sum(math.prod(shape) for shape in mapping.hf.values())
        if mapping.is_of_expert:
            experts += count
        else:
            dense += count
    return dense, experts


def active_parameters(architecture: Architecture) -> int:
    """Parameters used for one token: all of a dense model; of experts, those the router chose."""
    dense, experts = parameter_counts(architecture)
    if not architecture.is_moe:
        return dense
    assert architecture.moe_router_topk is not None
    assert architecture.num_moe_experts is not None
    return dense + experts * architecture.moe_router_topk // architecture.num_moe_experts


def parameter_mappings(
    architecture: Architecture, with_code: bool | None = None
) -> list[ParameterMapping]:
    """The Megatron parameters of a model, with the Hugging Face tensors of each.

    Args:
        architecture: Of the model.
        with_code: Names of a folder that brings modelling code, which has Llama's (True), or of the
            family's autoregressive folders (False); None: as the type in config.json says.
    """
    if with_code is None:
        model_type = _model_type(architecture.hf_config)
        with_code = model_type is not None and model_type.architecture is None
    own = FAMILIES[architecture.family].parameters
    return llama_parameters(architecture) if with_code else own(architecture)


def _check_supported(config: Mapping[str, Any], where: str) -> None:
    def refuse(key: str, remedy: str) -> UserError:
        return bad_value(f"{where}: {key}", config[key], "is not supported", remedy)

    supported = model_types()
    if config.get("model_type") not in supported:
        raise bad_value(
            f"{where}: model_type",
            config.get("model_type"),
            "is not a supported architecture",
            f"use one of {', '.join(supported)}",
        )
    if config.get("attention_bias"):
        raise refuse("attention_bias", "use a checkpoint without attention biases")
    if config.get("mlp_bias"):
        raise refuse("mlp_bias", "use a checkpoint without biases of the feed-forward layers")
    if config.get("use_sliding_window"):
        raise refuse("use_sliding_window", "use a checkpoint with global attention")
    if config.get("hidden_act", "silu") != "silu":
        raise refuse("hidden_act", "use a checkpoint with SwiGLU (silu)")
    if config.get("mlp_only_layers"):
        raise refuse("mlp_only_layers", "use a checkpoint whose layers are all mixtures of experts")
    if config.get("decoder_sparse_step", 1) != 1:
        raise refuse("decoder_sparse_step", "use a checkpoint with decoder_sparse_step 1")
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else None
        raise UserError(
            f"{where}: quantization_config states quantised weights"
            f"{f' ({method})' if isinstance(method, str) else ''}, which are not read;"
            " use the checkpoint in bfloat16 or float32"
        )


def _num_experts(config: Mapping[str, Any], where: str) -> int:
    """`num_experts`, which transformers 5 writes as `num_local_experts`."""
    stated = [config[key] for key in ("num_experts", "num_local_experts") if key in config]
    if not stated:
        raise KeyError("num_experts")
    if stated[0] != stated[-1]:
        raise bad_value(
            f"{where}: num_experts",
            stated[0],
            f"but the file also says num_local_experts = {stated[-1]}",
            "leave one of them out",
        )
    experts: int = stated[0]
    return experts


def architecture_from_hf(
    config: Mapping[str, Any],
    where: str = "config.json",
    generation_config: Mapping[str, Any] | None = None,
) -> Architecture:
    """Read an architecture from a parsed `config.json`.

    Args:
        config: The JSON object; a null is taken for an absent key, but for the family's `nulls`.
        where: Name of the file for error messages.
        generation_config: The object of the `generation_config.json` beside it, if there is one.

    Raises:
        UserError: A field is missing, is of the wrong type or asks for something that is not
            supported.
    """
    given, config = config, checked_keys(config, CONFIG_KEYS, where)
    _check_supported(config, where)
    family, kind = model_types()[config["model_type"]]
    config |= {key: None for key in family.nulls if key in given and key not in config}
    family.check(config, where)
    is_moe = kind.is_moe
    value = {**DEFAULTS, **kind.defaults, **config}
    try:
        heads = value["num_attention_heads"]
        base, scaling = read_rotary_embedding(config, where, kind.defaults.get("rope_theta"))
        if is_moe:
            experts = _num_experts(config, where)
            config["num_experts"] = experts
        architecture = Architecture(
            family=family.name,
            num_layers=value["num_hidden_layers"],
            hidden_size=value["hidden_size"],
            ffn_hidden_size=value["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=value.get("num_key_value_heads", heads),
            kv_channels=value.get("head_dim", value["hidden_size"] // heads),
            vocab_size=value["vocab_size"],
            max_position_embeddings=value["max_position_embeddings"],
            layernorm_epsilon=float(value["rms_norm_eps"]),
            rotary_base=base,
            rope_scaling=scaling,
            qk_norm=family.qk_norm,
            qkv_bias=family.qkv_bias,
            tie_word_embeddings=value["tie_word_embeddings"],
            initializer_range=float(value["initializer_range"]),
            hf_config=config,
            num_moe_experts=experts if is_moe else None,
            moe_router_topk=value["num_experts_per_tok"] if is_moe else None,
            moe_ffn_hidden_size=value["moe_intermediate_size"] if is_moe else None,
            norm_topk_prob=value["norm_topk_prob"] if is_moe else True,
            generation_config=dict(generation_config or {}),
            file=where,
        )
    except KeyError as error:
        raise bad_value(
            where, error.args[0], "this key is missing", "use a complete Hugging Face config.json"
        ) from error
    _check_sizes(architecture)
    return architecture


def _check_sizes(architecture: Architecture) -> None:
    """Check that the sizes fit each other, without looking at the weights."""
    a = architecture

    def refuse(problem: str) -> UserError:
        return UserError(f"{a.file}: {problem}; use the config.json that belongs to the weights")

    # Either of two keys may be wrong, so both are named.
    if a.num_attention_heads % a.num_query_groups:
        raise refuse(
            f"num_attention_heads = {a.num_attention_heads} is no multiple of num_key_value_heads ="
            f" {a.num_query_groups}"
        )
    if a.kv_channels < 1 or a.kv_channels % 2:
        raise refuse(f"head_dim = {a.kv_channels} is no even number of channels to rotate")
    if a.moe_router_topk is not None and a.moe_router_topk > (a.num_moe_experts or 0):
        raise refuse(
            f"num_experts_per_tok = {a.moe_router_topk} is more than num_experts ="
            f" {a.num_moe_experts}"
        )
    layer_types = a.hf_config.get("layer_types")
    if layer_types is not None and len(layer_types) != a.num_layers:
        raise refuse(
            f"num_hidden_layers = {a.num_layers} and the {len(layer_types)} layer_types differ"
        )


def read_architecture(path: str | Path, field: str = "--load") -> Architecture:
    """Read the architecture from a `config.json` or the folder that holds it.

    Args:
        path: File or folder.
        field: The flag that the path came from, for error messages.

    Raises:
        UserError: There is no such file, it or the `generation_config.json` beside it is no JSON
            object, or it is not supported.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    if not file.is_file():
        raise bad_value(field, str(path), f"there is no {file}", "name a Hugging Face model folder")
    config = read_json_object(file, field)
    return architecture_from_hf(config, str(file), read_generation_config(file.parent, field))


def read_generation_config(folder: Path, field: str = "--load") -> dict[str, Any]:
    """The object of a folder's `generation_config.json` without its nulls; empty without a file.

    Args:
        folder: Of the model.
        field: The flag that the folder came from, for error messages.

    Raises:
        UserError: The file is no JSON object, or states something that is no token id.
    """
    file = folder / GENERATION_CONFIG
    if not file.is_file():
        return {}
    return checked_keys(read_json_object(file, field), TOKEN_KEYS, str(file))
