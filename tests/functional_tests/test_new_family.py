"""A model family is one file: planned, trained, exported with its code and read again."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.tiny import REPOSITORY, save_random_model, write_data
from tests.unit_tests.conversion.megatron_models import random_tokens

COMMANDS = """\
import sys
from pathlib import Path
from megatron_dlm.commands import main

def run(command):
    assert main(command.split()) == 0, command

source, out = sys.argv[1:]
data = f"--train-data {out}/examples.jsonl --objective sft --context-attention causal"
sizes = "--train-iters 2 --global-batch-size 4 --lr-warmup-iters 0 --device cpu"
lengths = "--max-prompt-length 64 --max-response-length 64"
plan = "--config examples/tiny/opdlm.yaml --gpus 2 --gpu h100 --rows 1"
run(f"plan {plan} --student-config {source}/config.json")
run(f"train --load {source} --save {out}/run {data} {sizes} {lengths}")
run(f"convert --load {out}/run --save {out}/code")
run(f"convert --load {out}/run --save {out}/autoregressive --target-format autoregressive")
read = f"evaluate --data {out}/examples.jsonl --max-response-length 8 --device cpu"
run(f"{read} --load {out}/code --settings static --output {out}/scores.json")
data = f"--prompts {out}/examples.jsonl --num-rollouts 1 --rollout-batch-size 4 --lora-rank 2"
sizes = "--global-batch-size 4 --lr-warmup-iters 0 --device cpu"
lengths = "--max-prompt-length 64 --max-response-length 8"
run(f"train --load {source} --save {out}/lora {data} {sizes} {lengths}")
run(f"convert --load {out}/lora --save {out}/base --without-adapters")
peft = f"--target-format peft --base-model {out}/base"
run(f"convert --load {out}/lora --save {out}/peft {peft}")
"""


def test_a_further_family_is_one_file(tmp_path: Path) -> None:
    framework = tmp_path / "framework"
    for name in ("megatron_dlm", "examples/tiny"):
        shutil.copytree(REPOSITORY / name, framework / name)
    page = (REPOSITORY / "docs" / "adding-a-model-family.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (framework / "megatron_dlm" / "models" / "families" / "phi3.py").write_text(code)
    source = save_random_model(tmp_path / "phi3", family="phi3")
    write_data(tmp_path, 4)
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, source, tmp_path],
        cwd=framework,
        env={**os.environ, "PYTHONPATH": str(framework)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    def read(name: str) -> Any:
        code = name != "autoregressive"
        return AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=code).eval()

    tokens = random_tokens()[None]
    expected = read("autoregressive")(tokens).logits
    logits = read("code")(tokens).logits  # whole blocks of a causal context
    assert (logits - expected).abs().max() < 1e-4
    with_code, fused = (
        load_file(tmp_path / name / "model.safetensors") for name in ("code", "autoregressive")
    )
    layer = "model.layers.1.self_attn"
    parts = [with_code[f"{layer}.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(torch.cat(parts), fused[f"{layer}.qkv_proj.weight"])
    # A trained adapter changes what the folder that it belongs on computes.
    alone = read("base")(tokens, attention_pattern="block_causal").logits
    adapted = PeftModel.from_pretrained(read("base"), tmp_path / "peft")
    assert not torch.equal(adapted(tokens, attention_pattern="block_causal").logits, alone)
