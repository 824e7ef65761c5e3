"""Target format `autoregressive`: a model that any code for its family loads."""

import json
from pathlib import Path
from typing import Any

from megatron_dlm.conversion.formats.request import ExportRequest
from megatron_dlm.conversion.tokenizer_files import copy_tokenizer
from megatron_dlm.models.architecture import GENERATION_CONFIG, Architecture
from megatron_dlm.models.families import FAMILIES

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_UNSCALED = {"rope_type": "default"}


def network_config(request: ExportRequest) -> dict[str, Any]:
    """The fields of `config.json` that describe the network.

    `rope_theta` is written at the top level, where transformers 4 and SGLang read it (without it
    they silently use 10000), and in `rope_parameters`, where transformers 5 and lmdeploy read it;
    likewise `rope_scaling`.
    """
    a: Architecture = request.architecture
    config: dict[str, Any] = {
        "attention_dropout": 0.0,
        "dtype": str(request.dtype).removeprefix("torch."),
        "head_dim": a.kv_channels,
        "hidden_act": "silu",
        "hidden_size": a.hidden_size,
        "initializer_range": a.initializer_range,
        "intermediate_size": a.ffn_hidden_size,
        "max_position_embeddings": a.max_position_embeddings,
        "num_attention_heads": a.num_attention_heads,
        "num_hidden_layers": a.num_layers,
        "num_key_value_heads": a.num_query_groups,
        "rms_norm_eps": a.layernorm_epsilon,
        "rope_parameters": {"rope_theta": a.rotary_base} | (a.rope_scaling or _UNSCALED),
        "rope_theta": a.rotary_base,
        "tie_word_embeddings": a.tie_word_embeddings,
        "use_cache": True,
        "vocab_size": a.vocab_size,
    }
    if a.rope_scaling is not None:
        config["rope_scaling"] = a.rope_scaling
    config |= FAMILIES[a.family].config(a)
    # transformers 4 knows the type under its older name.
    config["torch_dtype"] = config["dtype"]
    return config | {key: a.hf_config[key] for key in _TOKEN_IDS if key in a.hf_config}


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write a JSON object as transformers formats it."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_generation_config(request: ExportRequest, folder: Path) -> None:
    """Write the source's generation_config.json, or one with the token ids of config.json.

    Every folder has the file: the public RND1 code needs it to load, and readers look there first
    for what ends a response.
    """
    config = request.architecture.hf_config
    stated = {key: config[key] for key in _TOKEN_IDS if config.get(key) is not None}
    write_json(folder / GENERATION_CONFIG, stated | request.architecture.generation_config)


def write_autoregressive(request: ExportRequest, folder: Path) -> None:
    """Write everything but the weights.

    Raises:
        UserError: The tokenizer cannot be copied.
    """
    architecture = request.architecture
    kind = FAMILIES[architecture.family].autoregressive_type(is_moe=architecture.is_moe)
    config = network_config(request) | {
        "architectures": [kind.architecture],
        "model_type": kind.name,
    }
    write_json(folder / "config.json", config)
    write_generation_config(request, folder)
    if request.tokenizer_folder is not None:
        copy_tokenizer(request.tokenizer_folder, folder)
