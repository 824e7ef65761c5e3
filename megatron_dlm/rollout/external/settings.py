"""What decides the tokens of a response: of a run and of a server, to be compared.

Our own server says all of it. SGLang says the names of model and algorithm, and where its
configuration files are: these are read where this machine has them too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_dlm.models.architecture import Architecture
from megatron_dlm.rollout.external.client import RolloutServer
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.types.special_tokens import SpecialTokens

SGLANG_MODELS = {
    "SDARForCausalLM": {"block_size": 4, "mask_token_id": 151669},
    "SDARMoeForCausalLM": {"block_size": 4, "mask_token_id": 151669},
}
"""Architectures of SGLang that exports are for: its constants for MASK and the block size."""

SGLANG_THRESHOLD = 0.95
"""Of its algorithm LowConfidence, where its configuration names none."""

_NOT_COMPARED = frozenset(
    {
        "file",
        "generation_config",
        "hf_config",
        "initializer_range",
        "max_position_embeddings",
        "tie_word_embeddings",
    }
)
"""Of an architecture: what decides no logit."""


def described(
    architecture: Architecture,
    generation: GenerationConfig,
    special_tokens: SpecialTokens,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Everything that decides which tokens a model gives, but its weights, prompts and draws.

    Args:
        architecture: Of the model.
        generation: How it decodes.
        special_tokens: Of the model.
        dtype: Of its weights.

    Returns:
        A flat object as JSON knows it, but for `hf_config`, the names that config.json has.
    """
    sizes = {n: v for n, v in asdict(architecture).items() if n not in _NOT_COMPARED}
    option = generation.strategy.option
    values: dict[str, Any] = sizes | {
        "block_size": generation.block_size,
        "attention_pattern": generation.attention_pattern,
        "shifted": generation.shifted,
        "context_attention": generation.context_attention,
        "mask_token_id": special_tokens.mask_token_id,
        "eos_token_ids": sorted(special_tokens.eos_token_ids),
        "dtype": str(dtype).removeprefix("torch."),
        "remasking_strategy": generation.remasking_strategy,
    }
    if option is not None:
        value = generation.strategy_value
        # An option without a default stands for one token a step.
        values[option.name] = generation.block_size if value is None else value
    hf = architecture.hf_config
    values["hf_config"] = {
        "model_type": hf.get("model_type"),
        "architectures": hf.get("architectures"),
    }
    decoded: dict[str, Any] = json.loads(json.dumps(values))
    return decoded


def check_settings(
    server: RolloutServer, run: Mapping[str, Any], temperature: float, longest: int
) -> bool:
    """Compare a server with a run.

    Args:
        server: Is asked.
        run: `described`.
        temperature: Of the run's draws.
        longest: Tokens of its longest prompt and response, in whole blocks.

    Returns:
        Whether its responses say at which step each token was kept.

    Raises:
        UserError: Something differs, or cannot be known.
    """
    info = server.get("/server_info")
    theirs = info.get("megatron_dlm")
    if isinstance(theirs, dict):
        for name, value in run.items():
            if name != "hf_config" and theirs.get(name) != value:
                raise _differs(server, name, theirs.get(name), value)
    else:
        _check_sglang(server, info, run, temperature)
    room = info.get("context_length")
    if isinstance(room, int) and room < longest:
        problem = f"context_length is {room}, and the run's longest prompt and response need"
        raise server.refuse(f"{problem} {longest}", "start the server with a larger one")
    return isinstance(theirs, dict)


def _differs(server: RolloutServer, name: str, theirs: Any, ours: Any) -> Exception:
    flags = ("block_size", "remasking_strategy", "dynamic_threshold", "denoising_steps_per_block")
    if name in flags or "entropy" in name:
        flag = "--" + name.replace("_", "-")
        remedy = f"start the server with {flag} {ours}, or the run with {flag} {theirs}"
    elif name == "dtype":
        remedy = "start the server and the run both with --bf16, or both without"
    else:
        remedy = "start the server with the run's model and tokenizer"
    return server.refuse(f"{name} is {theirs!r} there and {ours!r} in the run", remedy)


def _check_sglang(
    server: RolloutServer, info: Mapping[str, Any], run: Mapping[str, Any], temperature: float
) -> None:
    """What SGLang tells of itself, and what its files say."""
    expected = "SDARMoeForCausalLM" if run["num_moe_experts"] else "SDARForCausalLM"
    architectures = server.get("/model_info").get("architectures") or []
    theirs = architectures[0] if architectures else None
    if theirs != expected:
        raise _differs(server, "architectures", theirs, expected)
    for name, value in (
        ("family", "qwen3"),
        ("attention_pattern", "block_causal"),
        ("context_attention", "block_causal"),
        ("shifted", False),
    ):
        if run[name] != value:
            problem = f"{name} is {value!r} in what SGLang decodes and {run[name]!r} in the run"
            raise server.refuse(
                problem, "take megatron-dlm rollout-server, or --rollout-engine internal"
            )
    if temperature != 0:
        problem = f"SGLang takes the most likely tokens, the run has --temperature {temperature:g}"
        remedy = "choose --temperature 0, or take megatron-dlm rollout-server"
        raise server.refuse(problem, remedy)
    algorithm = info.get("dllm_algorithm")
    if algorithm != "LowConfidence":
        raise server.refuse(
            f"dllm_algorithm is {algorithm!r}, and the run decodes as 'LowConfidence' does",
            "start it with --dllm-algorithm LowConfidence",
        )
    constants = SGLANG_MODELS[expected]
    if constants["mask_token_id"] != run["mask_token_id"]:
        raise _differs(server, "mask_token_id", constants["mask_token_id"], run["mask_token_id"])
    config = _sglang_config(server, info)
    size = config.get("block_size", constants["block_size"])
    if size != run["block_size"]:
        raise _differs(server, "block_size", size, run["block_size"])
    _check_threshold(server, config.get("threshold", SGLANG_THRESHOLD), run)
    _check_model_files(server, info, run)


def _check_threshold(server: RolloutServer, threshold: Any, run: Mapping[str, Any]) -> None:
    """LowConfidence keeps what is above a threshold; from 1 on, that is one token a step."""
    strategy = run["remasking_strategy"]
    if strategy == "low_confidence_static":
        ours: Any = 1
        steps = run["denoising_steps_per_block"]
        if steps != run["block_size"]:
            problem = f"the run keeps {run['block_size'] // steps} tokens a step, SGLang one"
            remedy = "drop --denoising-steps-per-block, or choose low_confidence_dynamic"
            raise server.refuse(problem, remedy)
        fits = isinstance(threshold, int | float) and threshold >= 1
    elif strategy == "low_confidence_dynamic":
        ours = run["dynamic_threshold"]
        fits = threshold == ours
    else:
        problem = f"remasking_strategy is {strategy!r} in the run, and SGLang has no such algorithm"
        remedy = "choose low_confidence_dynamic, or take megatron-dlm rollout-server"
        raise server.refuse(problem, remedy)
    if not fits:
        problem = f"threshold is {threshold!r} there and {ours!r} in the run"
        remedy = f"write threshold: {ours} into the file of --dllm-algorithm-config"
        raise server.refuse(problem, remedy)


def _sglang_config(server: RolloutServer, info: Mapping[str, Any]) -> Mapping[str, Any]:
    """Its file of `--dllm-algorithm-config`; nothing of it is told over HTTP."""
    path = info.get("dllm_algorithm_config")
    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        problem = f"dllm_algorithm_config is {path!r}, which this machine cannot read ({error})"
        remedy = "put the same file at that path here, so that block size and threshold are known"
        raise server.refuse(problem, remedy) from error
    return content if isinstance(content, dict) else {}


_CONFIG_NAMES = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "num_moe_experts": "num_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "rotary_base": "rope_theta",
}
"""Sizes by their names in config.json."""


def _check_model_files(
    server: RolloutServer, info: Mapping[str, Any], run: Mapping[str, Any]
) -> None:
    """The config.json that it serves, where this machine has it: else the first push compares."""
    file = Path(str(info.get("model_path"))) / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError):
        return
    for name, theirs in _CONFIG_NAMES.items():
        if run[name] is not None and theirs in config and config[theirs] != run[name]:
            raise _differs(server, f"{theirs} in {file}", config[theirs], run[name])
