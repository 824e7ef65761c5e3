"""The conversion tool, called as a function with command-line arguments."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.unit_tests.conversion.hf_models import random_hf_model, save_hf_model
from tests.unit_tests.conversion.tokenizers import MASK_TOKEN_ID, save_tokenizer


@pytest.fixture
def source(tmp_path):
    folder = save_hf_model(random_hf_model(), tmp_path / "source")
    return save_tokenizer(folder)


def test_there_and_back(tmp_path, source, convert):
    megatron = tmp_path / "megatron"
    status, _ = convert("--load", source, "--save", megatron, "--target-format", "megatron")
    assert status == 0
    assert (megatron / "iter_0000000" / "hf" / "tokenizer.json").is_file()
    # Others may read what the umask lets them.
    plain = tmp_path / "plain"
    plain.touch()
    modes = {file.stat().st_mode for file in megatron.rglob("*") if file.is_file()}
    assert modes == {plain.stat().st_mode}

    for target, extra in (("autoregressive", ()), ("sdar", ("--block-size", 8))):
        out = tmp_path / target
        status, _ = convert("--load", megatron, "--save", out, "--target-format", target, *extra)
        assert status == 0
        expected = load_file(source / "model.safetensors")
        exported = load_file(out / "model.safetensors")
        assert exported.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(exported[name], tensor)
    config = json.loads((tmp_path / "sdar" / "config.json").read_text())
    assert config["block_size"] == 8
    assert config["mask_token_id"] == MASK_TOKEN_ID

    # What decodes by blocks is not written as what is read as autoregressive.
    status, error = convert(
        *(
            "--load",
            tmp_path / "sdar",
            "--save",
            tmp_path / "new",
            "--target-format",
            "autoregressive",
        )
    )
    assert status == 2
    assert "sdar/config.json states a diffusion model with block_causal attention" in error
    assert not (tmp_path / "new").exists()

    # Block size and MASK are remembered, and the same folder may be written again when told.
    status, _ = convert(
        "--load",
        tmp_path / "sdar",
        "--save",
        tmp_path / "autoregressive",
        "--overwrite",
        "--dtype",
        "bfloat16",
    )
    assert status == 0
    config = json.loads((tmp_path / "autoregressive" / "config.json").read_text())
    assert (config["model_type"], config["block_size"]) == ("sdar", 8)
    assert load_file(tmp_path / "autoregressive" / "model.safetensors")["lm_head.weight"].dtype == (
        torch.bfloat16
    )


def test_weights_of_another_type_are_cast_on_loading(tmp_path, source, convert):
    # A run in float32 from a checkpoint whose config.json says bfloat16.
    megatron = tmp_path / "megatron"
    convert("--load", source, "--save", megatron, "--target-format", "megatron")
    config_file = megatron / "iter_0000000" / "hf" / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"dtype": "bfloat16"}))
    (megatron / "iter_0000000" / "manifest.json").unlink()  # which knows the file as it was
    out = tmp_path / "out"
    status, error = convert("--load", megatron, "--save", out, "--target-format", "autoregressive")
    assert status == 0, error
    expected = load_file(source / "model.safetensors")
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, expected[name].bfloat16())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--save", "{new}"), "error: --load = None: nothing to convert"),
        (("--load", "{source}"), "error: --save = None: nothing to write to"),
        (("--load", "{new}", "--save", "{new}"), "there is no such folder"),
        (("--load", "{source}", "--save", "{source}"), "already exists; name a new folder or add"),
        (("--load", "{source}", "--save", "{new}"), "error: --block-size = None: sdar needs"),
        (("--load", "{source}", "--save", "{new}", "--target-format", "gguf"), "gguf"),
        (
            ("--load", "{source}", "--save", "{new}", "--tensor-model-parallel-size", "2"),
            "does not divide the 1 process",
        ),
        (("--load", "{source}", "--save", "{new}", "--blok-size", "4"), "--block-size"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, source, convert, arguments, message):
    places = {"source": source, "new": tmp_path / "new"}
    status, error = convert(*(argument.format(**places) for argument in arguments))
    assert status == 2
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "new").exists()
