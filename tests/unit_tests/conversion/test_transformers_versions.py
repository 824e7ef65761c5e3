"""Every export loads, computes and generates the same under the oldest and newest transformers."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from megatron_dlm.config import Config
from megatron_dlm.conversion.hf_export import export_hf
from megatron_dlm.conversion.hf_import import load_hf_weights
from megatron_dlm.models.architecture import read_architecture
from megatron_dlm.models.model_provider import build_model
from tests.transformers_versions import python_with_transformers, supported_versions
from tests.unit_tests.conversion.hf_models import random_hf_model, save_hf_model, two_mode_logits
from tests.unit_tests.conversion.megatron_models import VOCAB_SIZE, megatron_logits, random_tokens
from tests.unit_tests.conversion.tokenizers import MASK_TOKEN_ID, save_tokenizer

pytestmark = pytest.mark.usefixtures("single_process")

SCRIPT = Path(__file__).with_name("load_exports.py")
TOKENS = random_tokens()
NUM_MASKED = 6
TOKENS[-NUM_MASKED:] = MASK_TOKEN_ID
BLOCKS, FULL = {"attention_pattern": "block_causal"}, {"attention_pattern": "full"}
TWO_MODES = BLOCKS | {"context_attention": "causal", "shifted": False}
QWEN3_FORMATS = [
    ("sdar", BLOCKS),
    ("a2d-qwen3", FULL),
    ("a2d-qwen3", BLOCKS),
    ("two-mode-qwen3", TWO_MODES),
    ("autoregressive", {}),
]
FAMILY_FORMATS = {
    "qwen3_yarn": ("sdar", BLOCKS),
    "qwen2": ("a2d-qwen2", FULL),
    "llama": ("a2d-llama", BLOCKS),
    "mistral": ("a2d-mistral", FULL),
}
MOE_FORMATS = [
    ("sdar", BLOCKS),
    ("two-mode-qwen3", TWO_MODES),
    ("rnd1", FULL | {"shifted": True}),
    ("autoregressive", {}),
]


@pytest.fixture(scope="module")
def exports(tmp_path_factory, single_process):
    """Folders of all formats, tied and not, each with our logits and head."""
    folder = tmp_path_factory.mktemp("exports")
    tokenizer = save_tokenizer(folder / "tokenizer")
    # As Qwen3's, it has special tokens without a role, which transformers 5 writes in its own way.
    special = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    special.add_special_tokens({"extra_special_tokens": ["x27"]})
    special.save_pretrained(tokenizer)
    expected = {}
    cases = [
        (family, tied, formats)
        for family, formats in (("qwen3", QWEN3_FORMATS), ("qwen3_moe", MOE_FORMATS))
        for tied in (False, True)
    ]
    cases += [(family, family == "qwen2", [format]) for family, format in FAMILY_FORMATS.items()]
    for family, tied, formats in cases:
        moe = family == "qwen3_moe"
        kind = f"{family}.{'tied' if tied else 'untied'}"
        # The length that YaRN's factor makes of the original one: transformers warns of others.
        hf_model = random_hf_model(family=family, moe=moe, tied=tied, max_position_embeddings=64)
        source = save_hf_model(hf_model, folder / f"source.{kind}")
        architecture = read_architecture(source)
        model = build_model(architecture, Config())
        load_hf_weights(model, architecture, source)
        weights = load_file(source / "model.safetensors")
        head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
        for format, stated in formats:
            pattern = stated.get("attention_pattern", "causal")
            # Names with dots: transformers makes modules of them.
            out = folder / f"{format}.{pattern}.{kind}"
            export_hf(
                model,
                replace(architecture, hf_config=architecture.hf_config | stated),
                out,
                format=format,
                tokenizer_folder=tokenizer,
                block_size=4,
                mask_token_id=MASK_TOKEN_ID,
                # several files
                max_shard_size=100_000 if moe else 10**9,
            )
            logits = megatron_logits(model, TOKENS, pattern, 4)[:, :VOCAB_SIZE]
            if stated == TWO_MODES:
                noisy = torch.arange(len(TOKENS)) >= (len(TOKENS) - NUM_MASKED) // 4 * 4
                logits = two_mode_logits(hf_model, TOKENS, noisy, 4)
            expected[out] = logits, head
    return expected


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", supported_versions())
def test_exports_load_and_generate(exports, tmp_path, version):
    python = python_with_transformers(version)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    environment.pop("PYTHONPATH", None)
    # -P: not the script's folder first, where a file is called as a package of transformers is.
    command = [python, "-P", SCRIPT, str(TOKENS.tolist()), tmp_path, *exports]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "version").read_text() == version
    results = load_file(tmp_path / "results.safetensors")
    for folder, (logits, head) in exports.items():
        assert (results[f"{folder.name}/logits"] - logits).abs().max() < 2e-5, folder.name
        assert torch.equal(results[f"{folder.name}/head"], head), folder.name
        assert 0 < len(results[f"{folder.name}/response"]) <= NUM_MASKED, folder.name
    warned = json.loads((tmp_path / "warnings.json").read_text())
    assert {name: found for name, found in warned.items() if found} == {}


def test_the_readme_states_the_supported_versions():
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    for version in supported_versions():
        assert version in readme
