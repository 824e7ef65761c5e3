"""Exported tensors equal the imported ones, in folders that transformers and engines read."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_dlm.commands.convert import TargetFormat
from megatron_dlm.config import Config
from megatron_dlm.conversion.formats import TARGET_FORMATS
from megatron_dlm.conversion.hf_export import export_hf
from megatron_dlm.conversion.hf_import import load_hf_weights
from megatron_dlm.errors import UserError
from megatron_dlm.models.architecture import parameter_mappings, read_architecture
from megatron_dlm.models.model_provider import build_model
from tests.families import FAMILIES
from tests.unit_tests.conversion.hf_models import hf_logits, random_hf_model, save_hf_model
from tests.unit_tests.conversion.megatron_models import megatron_logits, random_tokens
from tests.unit_tests.conversion.tokenizers import MASK_TOKEN_ID, save_tokenizer

pytestmark = pytest.mark.usefixtures("single_process")


def read_tensors(folder):
    """Name -> (file, tensor) of all safetensors of a folder."""
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            names = handle.keys()
            tensors |= {name: (file.name, handle.get_tensor(name)) for name in names}
    return tensors


def imported(folder):
    architecture = read_architecture(folder)
    model = build_model(architecture, Config())
    load_hf_weights(model, architecture, folder)
    return model, architecture


@pytest.fixture
def source(tmp_path):
    return save_hf_model(random_hf_model(tied=True), tmp_path / "source")


@pytest.fixture
def tokenizer(tmp_path):
    return save_tokenizer(tmp_path / "tokenizer")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bitwise(tmp_path, family, tied):
    hf_model = random_hf_model(family=family, moe=family == "qwen3_moe", tied=tied)
    source = save_hf_model(hf_model, tmp_path / "source")
    model, architecture = imported(source)
    max_shard_size = 40_000
    export_hf(
        model,
        architecture,
        tmp_path / "out",
        format="autoregressive",
        max_shard_size=max_shard_size,
    )

    expected, exported = read_tensors(source), read_tensors(tmp_path / "out")
    assert exported.keys() == expected.keys()
    for name, (_, tensor) in expected.items():
        assert torch.equal(exported[name][1], tensor), name

    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for name, (file, _) in exported.items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for _, t in exported.values())
    files = set(index["weight_map"].values())
    assert len(files) > 1
    for file in files:
        assert sum(t.nbytes for f, t in exported.values() if f == file) <= max_shard_size

    read_back = read_architecture(tmp_path / "out")
    assert replace(read_back, hf_config={}) == replace(architecture, hf_config={})
    # transformers takes config.json for what it took the source's for.
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(theirs) is type(hf_model)
    tokens = random_tokens()
    assert torch.equal(hf_logits(theirs, tokens), hf_logits(hf_model, tokens))


def test_export_in_another_type(tmp_path, source):
    model, architecture = imported(source)
    export_hf(model, architecture, tmp_path / "out", format="autoregressive", dtype=torch.bfloat16)
    expected = read_tensors(source)
    for name, (file, tensor) in read_tensors(tmp_path / "out").items():
        assert file == "model.safetensors"
        assert torch.equal(tensor, expected[name][1].bfloat16())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("moe", [False, True])
def test_sdar_folder(tmp_path, tokenizer, moe, tied):
    source = save_hf_model(random_hf_model(moe=moe, tied=tied), tmp_path / "source")
    model, architecture = imported(source)
    export_hf(
        model,
        architecture,
        tmp_path / "out",
        tokenizer_folder=tokenizer,
        block_size=8,
        mask_token_id=MASK_TOKEN_ID,
        dynamic_threshold=0.8,
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    kind, name = ("sdar_moe", "SDARMoe") if moe else ("sdar", "SDAR")
    assert config["architectures"] == [f"{name}ForCausalLM"]
    assert config["model_type"] == kind
    assert config["auto_map"]["AutoModelForCausalLM"] == f"modeling_{kind}.{name}ForCausalLM"
    assert config["block_size"] == 8
    assert config["mask_token_id"] == MASK_TOKEN_ID
    assert config["rope_theta"] == 50000.0
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 50000.0}
    assert config["fuse_cross_entropy"] is True
    assert config["eos_token_id"] == 1
    # SGLang looks the head up, tied or not.
    assert config["tie_word_embeddings"] is False
    expected, found = read_tensors(source), read_tensors(tmp_path / "out")
    assert found.keys() == expected.keys() | {"lm_head.weight"}
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert torch.equal(found["lm_head.weight"][1], expected[head][1])
    for reference in config["auto_map"].values():
        assert (tmp_path / "out" / f"{reference.split('.')[0]}.py").is_file()
    assert yaml.safe_load((tmp_path / "out" / "dllm_config.yaml").read_text()) == {
        "block_size": 8,
        "threshold": 0.8,
    }
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token_id == MASK_TOKEN_ID
    # Our own importer reads it back, as the folder says: a model with an output layer of its own.
    again, read_back = imported(tmp_path / "out")
    assert (read_back.is_moe, read_back.tie_word_embeddings) == (moe, False)
    tokens = random_tokens()
    assert torch.equal(megatron_logits(again, tokens), megatron_logits(model, tokens))
    export_hf(again, read_back, tmp_path / "again", format="autoregressive")
    for name, (_, tensor) in read_tensors(tmp_path / "again").items():
        assert torch.equal(tensor, found[name][1]), name


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_mode_that_the_umask_leaves(tmp_path, source, tokenizer, umask):
    model, architecture = imported(source)
    before = os.umask(umask)
    try:
        export_hf(
            model,
            architecture,
            tmp_path / "out",
            tokenizer_folder=tokenizer,
            block_size=4,
            mask_token_id=MASK_TOKEN_ID,
            max_shard_size=40_000,
        )
    finally:
        os.umask(before)
    files = list((tmp_path / "out").iterdir())
    assert {file.suffix for file in files} == {".json", ".md", ".py", ".safetensors", ".yaml"}
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_existing_folder_is_replaced_only_when_told(tmp_path, source):
    model, architecture = imported(source)
    target = tmp_path / "out"
    target.mkdir()
    (target / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="already exists"):
        export_hf(model, architecture, target, format="autoregressive")
    assert (target / "notes.txt").read_text() == "keep me"
    export_hf(model, architecture, target, format="autoregressive", overwrite=True)
    assert not (target / "notes.txt").exists()
    assert read_architecture(target).tie_word_embeddings
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": None}, "--block-size"),
        ({"mask_token_id": None}, "mask_token_id"),
        ({"mask_token_id": 150}, "mask_token_id = 150"),
        ({"mask_token_id": MASK_TOKEN_ID + 1}, "first free id is 30"),
        ({"tokenizer_folder": None}, "--tokenizer"),
        ({"format": "gguf"}, "use sdar or a2d-llama or .* or rnd1 or autoregressive"),
    ],
)
def test_what_a_format_cannot_express_is_refused(tmp_path, source, changes, message):
    model, architecture = imported(source)
    arguments = {
        "tokenizer_folder": save_tokenizer(tmp_path / "tokenizer"),
        "block_size": 4,
        "mask_token_id": MASK_TOKEN_ID,
    }
    with pytest.raises(UserError, match=message):
        export_hf(model, architecture, tmp_path / "out", **{**arguments, **changes})
    assert {path.name for path in tmp_path.iterdir()} == {"source", "tokenizer"}


def test_the_command_knows_all_formats():
    assert set(get_args(TargetFormat)) == {"megatron", *TARGET_FORMATS, "peft"}


def test_names_under_transformer_engine_are_those_of_megatron(source):
    # Megatron's local layers know under which names Transformer Engine keeps their norms, since
    # distributed checkpoints use these for both.
    model, architecture = imported(source)
    prefixes = model.decoder.layers[0].submodules_config.sharded_state_dict_keys_map
    assert len(prefixes) == 2
    found = 0
    for mapping in parameter_mappings(architecture):
        for local, fused in prefixes.items():
            if f".{local}" in mapping.megatron:
                assert mapping.transformer_engine == mapping.megatron.replace(local, fused)
                found += 1
    assert found == 2 * architecture.num_layers
