"""Target format `qwen3` / `qwen3_moe`: an autoregressive model that any Qwen3 code loads."""

import json
from pathlib import Path
from typing import Any

from megatron_dlm.conversion.formats.request import ExportRequest
from megatron_dlm.conversion.tokenizer_files import copy_tokenizer
from megatron_dlm.models.architecture import GENERATION_CONFIG, Architecture

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Fields that are handed on as the source has them, if it has them.
_PASSED_ON = (*_TOKEN_IDS, "router_aux_loss_coef")


def qwen3_config(request: ExportRequest) -> dict[str, Any]:
    """The fields of `config.json` that describe the network, under Qwen3's names.

    `rope_theta` is at the top level, where transformers 4 and SGLang read it, which would otherwise
    fall back to 10000 in silence, and in `rope_parameters`, where transformers 5 and lmdeploy do.
    """
    a: Architecture = request.architecture
    config: dict[str, Any] = {
        "attention_bias": False,
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
        "rope_parameters": {"rope_theta": a.rotary_base, "rope_type": "default"},
        "rope_theta": a.rotary_base,
        "sliding_window": None,
        "tie_word_embeddings": a.tie_word_embeddings,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": a.vocab_size,
    }
    if a.is_moe:
        config |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": a.moe_ffn_hidden_size,
            "norm_topk_prob": a.norm_topk_prob,
            "num_experts": a.num_moe_experts,
            "num_experts_per_tok": a.moe_router_topk,
            "output_router_logits": False,
        }
    # transformers 4 knows the type under its older name.
    config["torch_dtype"] = config["dtype"]
    return config | {key: a.hf_config[key] for key in _PASSED_ON if key in a.hf_config}


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write a JSON object as transformers formats it."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_generation_config(request: ExportRequest, folder: Path) -> None:
    """Write the source's generation_config.json, or one with the token ids of config.json.

    Every folder has the file: the public RND1 code does not load without, and what ends a response
    is looked for there first.
    """
    config = request.architecture.hf_config
    stated = {key: config[key] for key in _TOKEN_IDS if config.get(key) is not None}
    write_json(folder / GENERATION_CONFIG, stated | request.architecture.generation_config)


def write_qwen3(request: ExportRequest, folder: Path) -> None:
    """Write everything but the weights.

    Raises:
        UserError: The tokenizer cannot be copied.
    """
    is_moe = request.architecture.is_moe
    config = qwen3_config(request) | {
        "architectures": ["Qwen3MoeForCausalLM" if is_moe else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if is_moe else "qwen3",
    }
    write_json(folder / "config.json", config)
    write_generation_config(request, folder)
    if request.tokenizer_folder is not None:
        copy_tokenizer(request.tokenizer_folder, folder)
