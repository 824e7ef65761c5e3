"""Checks of Hugging Face `config.json` values: one table of keys for each file.

A null counts as an absent key. Keys that are not in the table are kept unchecked.
"""

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dlm.errors import UserError


@dataclass(frozen=True)
class KeyType:
    """A check of a value.

    Attributes:
        name: Description of valid values, for messages: "is not <name>".
        fits: Whether a value is valid.
    """

    name: str
    fits: Callable[[Any], bool]


def _whole(least: int, most: int) -> KeyType:
    # `type`, not `isinstance`: true and false are integers to Python.
    return KeyType(
        f"a whole number from {least} to {most}",
        lambda value: type(value) is int and least <= value <= most,
    )


def _number(name: str, fits: Callable[[float], bool]) -> KeyType:
    return KeyType(name, lambda value: _is_finite(value) and fits(value))


def _is_finite(value: object) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer beyond all floating point numbers
        return False


def _are_templates(value: list[Any]) -> bool:
    return all(
        isinstance(item, dict) and isinstance(item.get(key), str)
        for item in value
        for key in ("name", "template")
    )


def _is_token_id(value: object) -> bool:
    return type(value) is int and value >= 0


_BOOLEAN = KeyType("true or false", lambda value: isinstance(value, bool))
_TEXT = KeyType("a string", lambda value: isinstance(value, str))
_DTYPE = KeyType(
    "float64, float32, float16 or bfloat16",
    lambda value: value in ("float64", "float32", "float16", "bfloat16"),
)
_OBJECT = KeyType("an object", lambda value: isinstance(value, dict))
_TOKEN_ID = KeyType("a token id", _is_token_id)
_TOKEN_IDS = KeyType(
    "a token id or a list of them",
    lambda value: all(map(_is_token_id, value if isinstance(value, list) else [value])),
)
_LAYERS = KeyType(
    "a list of layer numbers",
    lambda value: isinstance(value, list) and all(map(_is_token_id, value)),
)
_LAYER_TYPES = KeyType(
    'a list of "full_attention", the only supported type',
    lambda value: isinstance(value, list) and all(kind == "full_attention" for kind in value),
)
_SPECIAL_TOKEN = KeyType(
    'a string or an object with "content"',
    lambda value: isinstance(value.get("content") if isinstance(value, dict) else value, str),
)
_TEMPLATE = KeyType(
    "a string or a list of named templates",
    lambda value: isinstance(value, str) or (isinstance(value, list) and _are_templates(value)),
)
_POSITIVE = _number("a number above 0", lambda value: value > 0)
_SMALL = _number("a number above 0 and below 1", lambda value: 0 < value < 1)
_NOT_NEGATIVE = _number("a number of 0 or more", lambda value: value >= 0)

# Far above any published model; a product of two sizes still fits 64 bits.
_WHOLE = _whole(0, 2**31)
_SIZE = _whole(1, 2**24)
_COUNT = _whole(1, 2**13)

TOKEN_KEYS: dict[str, KeyType] = {
    "bos_token_id": _TOKEN_ID,
    "eos_token_id": _TOKEN_IDS,
    "pad_token_id": _TOKEN_ID,
    "mask_token_id": _TOKEN_ID,
}
"""Keys of config.json and of generation_config.json."""

_ROPE_KEYS: dict[str, KeyType] = {
    "original_max_position_embeddings": _whole(1, 2**31),
    "partial_rotary_factor": _POSITIVE,
}
"""Keys of the rotary embedding that may also be at the top level."""

CONFIG_KEYS: dict[str, KeyType] = {
    "model_type": _TEXT,
    "num_hidden_layers": _COUNT,
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_attention_heads": _COUNT,
    "num_key_value_heads": _COUNT,
    "head_dim": _COUNT,
    "vocab_size": _SIZE,
    "max_position_embeddings": _whole(1, 2**31),
    "rms_norm_eps": _SMALL,
    "rope_theta": _POSITIVE,
    "rope_parameters": _OBJECT,
    "rope_scaling": _OBJECT,
    "initializer_range": _NOT_NEGATIVE,
    "tie_word_embeddings": _BOOLEAN,
    "attention_bias": _BOOLEAN,
    "mlp_bias": _BOOLEAN,
    "use_sliding_window": _BOOLEAN,
    "layer_types": _LAYER_TYPES,
    "hidden_act": _TEXT,
    "num_experts": _COUNT,
    "num_local_experts": _COUNT,
    "num_experts_per_tok": _COUNT,
    "moe_intermediate_size": _SIZE,
    "norm_topk_prob": _BOOLEAN,
    "decoder_sparse_step": _whole(1, 2**13),
    "mlp_only_layers": _LAYERS,
    "router_aux_loss_coef": _NOT_NEGATIVE,
    "block_size": _whole(1, 2**24),
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "attention_dropout": _NOT_NEGATIVE,
    "max_window_layers": _WHOLE,
    "output_router_logits": _BOOLEAN,
    "sliding_window": _WHOLE,
    "use_cache": _BOOLEAN,
    **_ROPE_KEYS,
    **TOKEN_KEYS,
}
"""Keys of config.json."""

ROPE_KEYS: dict[str, KeyType] = {
    "rope_theta": _POSITIVE,
    "rope_type": _TEXT,
    "type": _TEXT,
    "factor": _POSITIVE,
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "attention_factor": _POSITIVE,
    "beta_fast": _POSITIVE,
    "beta_slow": _POSITIVE,
    "mscale": _NOT_NEGATIVE,
    "mscale_all_dim": _NOT_NEGATIVE,
    "truncate": _BOOLEAN,
    **_ROPE_KEYS,
}
"""Keys of `rope_parameters` and `rope_scaling`."""

TOKENIZER_KEYS: dict[str, KeyType] = {
    "bos_token": _SPECIAL_TOKEN,
    "eos_token": _SPECIAL_TOKEN,
    "pad_token": _SPECIAL_TOKEN,
    "mask_token": _SPECIAL_TOKEN,
    "unk_token": _SPECIAL_TOKEN,
    "chat_template": _TEMPLATE,
    "model_max_length": _POSITIVE,
    "tokenizer_class": _TEXT,
    "added_tokens_decoder": _OBJECT,
}
"""Keys of tokenizer_config.json."""

DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "norm_topk_prob": False,
    "hidden_act": "silu",
    "decoder_sparse_step": 1,
}
"""Defaults of transformers for optional keys."""


def checked_keys(
    values: Mapping[str, Any], keys: Mapping[str, KeyType], where: str
) -> dict[str, Any]:
    """The values of a JSON object without its nulls.

    Args:
        values: The object.
        keys: The table for its keys.
        where: The file and, for an inner object, its key, for error messages.

    Raises:
        UserError: A value is not valid for its key.
    """
    values = {key: value for key, value in values.items() if value is not None}
    for key, expected in keys.items():
        if key in values and not expected.fits(values[key]):
            # `reprlib`: whatever the value is, the message is short.
            raise UserError(
                f"{where}: {key} = {reprlib.repr(values[key])}: is not {expected.name};"
                " repair the file, or leave the key out if it is optional"
            )
    return values
