"""Odd values of config.json are read as by transformers, or refused in one line."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, Qwen3Config

from megatron_dlm.errors import UserError
from megatron_dlm.models.architecture import Architecture, architecture_from_hf, read_architecture
from megatron_dlm.models.config_keys import CONFIG_KEYS
from megatron_dlm.training.model_source import open_model_source
from tests.refusal import refusal
from tests.tiny import save_random_model

VALUES: dict[str, Any] = {
    "null": None,
    "text": "x",
    "no text": "",
    "negative": -1,
    "zero": 0,
    "wrong size": 7,
    "another wrong size": 1024,
    "float": 1.5,
    "whole float": 4.0,
    "not a number": float("nan"),
    "infinite": float("inf"),
    "beyond 64 bits": 2**63,
    "beyond all floats": 10**400,
    "list": [1, [2]],
    "true": True,
    "object": {"a": {"b": 1}},
}
MISSED_WITH = {
    "rope_parameters": "rope_theta",
    "num_local_experts": "num_experts",
    "shifted": "attention_pattern",
}
OTHER_KEYS = ("attention_pattern", "shifted", "quantization_config", "architectures")

SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
}
DENSE_SIZES = {"intermediate_size": "ffn_hidden_size", "head_dim": "kv_channels"}
MOE_SIZES = {
    "num_experts": "num_moe_experts",
    "num_experts_per_tok": "moe_router_topk",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "norm_topk_prob": "norm_topk_prob",
}


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe", "llama", "mistral"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, family = tmp_path_factory.mktemp(request.param), request.param
    return save_random_model(folder, moe=family == "qwen3_moe", family=family, head_dim=8)


@pytest.fixture
def stated(model: Path) -> Any:
    """The parsed config.json, which is put back after the test."""
    text = (model / "config.json").read_text()
    yield json.loads(text)
    (model / "config.json").write_text(text)


def check_against_transformers(architecture: Architecture, config: dict[str, Any]) -> None:
    kind = CONFIG_MAPPING[config["model_type"]]
    try:
        theirs = kind(**config)
    except Exception:
        return  # transformers refuses it: a null where it has a default
    for key, name in (SIZES | (MOE_SIZES if architecture.is_moe else DENSE_SIZES)).items():
        assert getattr(architecture, name) == getattr(theirs, key), key
    assert architecture.rotary_base == theirs.rope_parameters["rope_theta"]


def check_message(message: str, file: Path, key: str) -> None:
    """One line that names the file and the key, or the one that is missing with it."""
    assert message.startswith(str(file))
    assert key in message or MISSED_WITH.get(key, key) in message, message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("key", [*CONFIG_KEYS, *OTHER_KEYS])
def test_every_key_with_every_kind_of_value(model: Path, stated: dict[str, Any], key: str) -> None:
    file = model / "config.json"
    for name, value in VALUES.items():
        config = stated | {key: value}
        file.write_text(json.dumps(config))
        began = time.process_time()
        message = refusal(lambda: open_model_source(str(model), "--load").diffusion_kind)
        assert time.process_time() - began < 1, name
        if message is None:
            check_against_transformers(read_architecture(model), config)
        else:
            check_message(message, file, key)


def test_a_missing_key_is_named_or_has_the_default_of_transformers(
    model: Path, stated: dict[str, Any]
) -> None:
    file = model / "config.json"
    for key in stated:
        config = {name: value for name, value in stated.items() if name != key}
        file.write_text(json.dumps(config))
        message = refusal(open_model_source, str(model), "--load")
        if message is None:
            check_against_transformers(read_architecture(model), config)
        else:
            check_message(message, file, key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 3),
        ("hidden_size", 64),
        ("vocab_size", 511),
        ("vocab_size", 513),
        ("num_attention_heads", 2),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 1),
        ("num_key_value_heads", 4),
        ("head_dim", 16),
    ],
)
def test_a_size_of_other_weights_is_the_fault_of_config_json(
    model: Path, stated: dict[str, Any], key: str, value: int
) -> None:
    stated.pop("layer_types", None)
    (model / "config.json").write_text(json.dumps(stated | {key: value}))
    with pytest.raises(UserError) as error:
        open_model_source(str(model), "--load")
    assert str(error.value).startswith(f"{model / 'config.json'}: {key} = {value}: but ")
    assert f"in {model} ha" in str(error.value)


BASE = {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
DEFAULT = {"rope_type": "default"}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6},
        {"rope_theta": 12345.67},
        {"rope_theta": 1e6, "rope_scaling": None, "rope_parameters": None},
        {"rope_theta": 1e4, "rope_parameters": {**DEFAULT, "rope_theta": 1e6}},
        {"rope_parameters": {**DEFAULT, "rope_theta": 1e6}},
        {"rope_theta": 1e5, "rope_parameters": DEFAULT},
        {"rope_theta": 1e5, "rope_scaling": {"type": "default"}},
        {"rope_theta": 1e5, "rope_scaling": {**DEFAULT, "rope_theta": 1e6}},
        {"rope_scaling": {}, "rope_parameters": {**DEFAULT, "rope_theta": 7e5}},
        {
            "rope_theta": 1e4,
            "rope_scaling": {**DEFAULT, "rope_theta": 1e6},
            "rope_parameters": {**DEFAULT, "rope_theta": 5e5},
        },
    ],
    ids=str,
)
def test_the_base_of_the_rotary_embedding_is_that_of_transformers(rope: dict[str, Any]) -> None:
    # A copy for each: transformers writes into the dictionaries.
    ours = architecture_from_hf(json.loads(json.dumps(BASE | rope))).rotary_base
    theirs = Qwen3Config(**json.loads(json.dumps(BASE | rope))).rope_parameters["rope_theta"]
    assert ours == theirs


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: factor = None"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"model_type": "mistral", "max_position_embeddings": 4097}, "sliding_window = 4096"),
        ({"model_type": "mistral", "sliding_window": 63}, "sliding_window = 63"),
        ({"model_type": "gpt2"}, "use one of llama, a2d-llama, two-mode-llama, mistral, "),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters = 'linear'"),
        ({"rope_parameters": {"full_attention": DEFAULT}}, "differ from layer to layer"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_parameters: rope_theta = '1e6'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "num_hidden_layers = 2 and the 1 layer_types"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 is no multiple of num_key_value"),
        ({"head_dim": 7}, "head_dim = 7 is no even number"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised weights (fp8)"),
        ({**BASE, "model_type": "qwen3_moe", "num_experts": 4}, "'num_experts_per_tok'"),
    ],
    ids=str,
)
def test_what_the_model_cannot_be_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as error:
        architecture_from_hf(BASE | {"rope_theta": 1e6} | changes, "here/config.json")
    assert str(error.value).startswith("here/config.json")
    assert named in str(error.value)


def test_two_names_of_the_number_of_experts() -> None:
    config = BASE | {
        "model_type": "qwen3_moe",
        "rope_theta": 1e6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    for stated in ({"num_experts": 4}, {"num_local_experts": 4}, {"num_experts": None}):
        both = {"num_local_experts": 4} | stated
        assert architecture_from_hf(config | both).num_moe_experts == 4
    with pytest.raises(UserError, match=r"num_experts = 4: .* num_local_experts = 8"):
        architecture_from_hf(config | {"num_experts": 4, "num_local_experts": 8})
