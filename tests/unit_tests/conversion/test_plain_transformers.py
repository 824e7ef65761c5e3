"""Exported folders work in a process that knows transformers and nothing of this repository."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from megatron_dlm.config import Config
from megatron_dlm.conversion.hf_export import export_hf
from megatron_dlm.conversion.hf_import import load_hf_weights
from megatron_dlm.models.architecture import read_architecture
from megatron_dlm.models.model_provider import build_model
from tests.unit_tests.conversion.hf_models import random_hf_model, save_hf_model
from tests.unit_tests.conversion.megatron_models import VOCAB_SIZE, megatron_logits, random_tokens
from tests.unit_tests.conversion.tokenizers import MASK_TOKEN_ID, save_tokenizer

pytestmark = pytest.mark.usefixtures("single_process")

# Arguments: input_ids as JSON, file for the results, folders.
SCRIPT = """
import json, pathlib, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
assert "megatron_dlm" not in sys.modules
torch.set_num_threads(1)
tokens, results = torch.tensor([json.loads(sys.argv[1])]), {}
for folder in map(pathlib.Path, sys.argv[3:]):
    auto = AutoModelForMaskedLM if folder.name in ("a2d-qwen3", "rnd1") else AutoModelForCausalLM
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    # Diffusion models are told that the tokens are clean on purpose.
    pattern = getattr(model.config, "attention_pattern", None)
    with torch.no_grad():
        results[folder.name] = model(
            tokens, **({} if pattern is None else {"attention_pattern": pattern})
        ).logits[0]
    if not folder.name.startswith("qwen3"):
        mask_token_id = AutoTokenizer.from_pretrained(folder).mask_token_id
        assert mask_token_id == model.config.mask_token_id
        output = model.generate(tokens, max_new_tokens=10)
        assert tokens.shape[1] < output.shape[1] <= tokens.shape[1] + 10
        model.save_pretrained(folder / "again")
        again = auto.from_pretrained(folder / "again", trust_remote_code=True)
        assert again.config.to_diff_dict().keys() == model.config.to_diff_dict().keys()
        for name in ("block_size", "shifted", "attention_pattern"):
            assert getattr(again.config, name, None) == getattr(model.config, name, None)
        assert torch.equal(again.generate(tokens, max_new_tokens=10), output)
save_file(results, sys.argv[2])
"""


@pytest.mark.timeout(120)
def test_folders_load_offline_and_give_our_logits(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    tokens, expected = random_tokens(), {}
    for moe in (False, True):
        # The dense model has tied embeddings and one file, the other a head and several files.
        source = save_hf_model(random_hf_model(moe=moe, tied=not moe), tmp_path / f"source_{moe}")
        architecture = read_architecture(source)
        model = build_model(architecture, Config())
        load_hf_weights(model, architecture, source)
        full = {"attention_pattern": "full", "shifted": True}
        targets = (
            ("sdar_moe" if moe else "sdar", "sdar", "block_causal", {}),
            ("qwen3_moe" if moe else "qwen3", "qwen3", "causal", {}),
            ("rnd1" if moe else "a2d-qwen3", "rnd1" if moe else "a2d-qwen3", "full", full),
        )
        for name, target, pattern, convention in targets:
            export_hf(
                model,
                replace(architecture, hf_config=architecture.hf_config | convention),
                tmp_path / name,
                format=target,
                tokenizer_folder=tokenizer,
                block_size=4,
                mask_token_id=MASK_TOKEN_ID,
                max_shard_size=100_000 if moe else 10**9,
            )
            expected[name] = megatron_logits(model, tokens, pattern, 4)[:, :VOCAB_SIZE]
    folders = [str(tmp_path / name) for name in expected]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    environment.pop("PYTHONPATH", None)
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tokens.tolist()), str(tmp_path / "results"), *folders],
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    results = load_file(tmp_path / "results")
    assert results.keys() == expected.keys()
    for name, logits in expected.items():
        assert (results[name] - logits).abs().max() < 1e-4, name
        assert not torch.equal(results[name][0], results[name][1])
