"""Imported transformers checkpoints give transformers' logits; unfit ones are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_dlm.config import Config, ModelConfig
from megatron_dlm.conversion.hf_import import load_hf_weights
from megatron_dlm.errors import UserError
from megatron_dlm.models.architecture import read_architecture
from megatron_dlm.models.model_provider import build_model
from tests.families import FAMILIES
from tests.unit_tests.conversion.hf_models import hf_logits, random_hf_model, save_hf_model
from tests.unit_tests.conversion.megatron_models import VOCAB_SIZE, megatron_logits, random_tokens

pytestmark = pytest.mark.usefixtures("single_process")


def import_model(folder, config=None):
    architecture = read_architecture(folder)
    model = build_model(architecture, config or Config())
    for parameter in model.parameters():  # whatever is not loaded shows
        parameter.data.fill_(float("nan"))
    load_hf_weights(model, architecture, folder)
    return model


@pytest.mark.parametrize("max_shard_size", ["5GB", "30KB"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tmp_path, family, tied, max_shard_size):
    hf_model = random_hf_model(family=family, moe=family == "qwen3_moe", tied=tied)
    save_hf_model(hf_model, tmp_path, max_shard_size)
    is_sharded = (tmp_path / "model.safetensors.index.json").is_file()
    assert is_sharded == (max_shard_size != "5GB")
    model = import_model(tmp_path)
    tokens = random_tokens()
    logits = megatron_logits(model, tokens)
    expected = hf_logits(hf_model, tokens)
    assert expected.std() > 0.3
    assert (logits[:, :VOCAB_SIZE] - expected).abs().max() < 1e-4
    assert not logits[:, VOCAB_SIZE:].any()  # padding rows are zeros


def test_weights_take_the_type_of_the_model(tmp_path):
    hf_model = random_hf_model()
    save_hf_model(hf_model, tmp_path)
    model = import_model(tmp_path, Config(model=ModelConfig(bf16=True)))
    expected = hf_model.model.layers[1].mlp.down_proj.weight.bfloat16()
    torch.testing.assert_close(
        model.decoder.layers[1].mlp.linear_fc2.weight.data, expected.data, rtol=0, atol=0
    )


@pytest.fixture
def checkpoint(tmp_path):
    return save_hf_model(random_hf_model(tied=True), tmp_path / "hf")


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


NAME = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(NAME), rf"tensor {NAME} is missing"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(2)}),
            r"model\.safetensors.*layers\.2\.mlp\.up_proj\.weight is no part",
        ),
        (
            lambda t: t.update({NAME: torch.zeros(48, 32)}),
            rf"model\.safetensors.*{NAME} has shape \[48, 32\] instead of \[32, 48\]",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(VOCAB_SIZE, 48)}),
            r"lm_head\.weight differs .* set tie_word_embeddings to false",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(checkpoint, edit, message):
    edit_tensors(checkpoint, edit)
    with pytest.raises(UserError, match=message):
        import_model(checkpoint)


def test_untied_architecture_needs_its_head(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(UserError, match=r"lm_head\.weight is missing"):
        import_model(checkpoint)


def test_tied_checkpoint_may_repeat_its_embedding(checkpoint):
    edit_tensors(
        checkpoint, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    model = import_model(checkpoint)
    assert torch.isfinite(model.embedding.word_embeddings.weight).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no_weights", r"holds neither model\.safetensors nor"),
        ("truncated", r"model\.safetensors'?: cannot be read"),
        ("no_folder", r"is not a folder"),
    ],
)
def test_unreadable_checkpoints_are_refused(checkpoint, damage, message):
    architecture = read_architecture(checkpoint)
    weights = checkpoint / "model.safetensors"
    if damage == "no_weights":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        checkpoint = checkpoint / "elsewhere"
    with pytest.raises(UserError, match=message):
        load_hf_weights(build_model(architecture, Config()), architecture, checkpoint)


@pytest.fixture
def sharded(tmp_path):
    return save_hf_model(random_hf_model(tied=True), tmp_path / "hf", "30KB")


def edit_index(folder, edit):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    edit(index["weight_map"])
    file.write_text(json.dumps(index))


def test_index_that_names_a_missing_file_is_refused(sharded):
    next(iter(sharded.glob("model-*.safetensors"))).unlink()
    with pytest.raises(UserError, match=r"index\.json names model-0.*which is not there"):
        import_model(sharded)


def test_index_that_misses_a_tensor_is_refused(sharded):
    edit_index(sharded, lambda weight_map: weight_map.pop(NAME))
    with pytest.raises(UserError, match=rf"tensor {NAME} is not listed in"):
        import_model(sharded)


def test_index_that_names_the_wrong_file_is_refused(sharded):
    def swap(weight_map):
        other = next(file for file in weight_map.values() if file != weight_map[NAME])
        weight_map[NAME] = other

    edit_index(sharded, swap)
    with pytest.raises(UserError, match=rf"tensor {NAME} is not in this file"):
        import_model(sharded)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_malformed_index_is_refused(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        import_model(sharded)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 2.5},  # an integer of it is another model
        {"rope_theta": 99.0, "rope_parameters": {"rope_type": "default", "rope_theta": 3.5}},
    ],
)
def test_rotary_embedding_is_that_of_transformers(tmp_path, rope):
    save_hf_model(random_hf_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config = {key: config[key] for key in config if not key.startswith("rope_")} | rope
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = random_tokens()
    logits = megatron_logits(import_model(tmp_path), tokens)
    assert (logits[:, :VOCAB_SIZE] - hf_logits(theirs, tokens)).abs().max() < 1e-4
