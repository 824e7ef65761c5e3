"""Training and rollout at the shapes of real Qwen3 models, with random weights.

Runs the entry points themselves. Training: `opdlm` with FlexAttention against the reference
attention (`sdpa`). Rollout: block diffusion with a KV cache against autoregressive decoding by the
same engine, and that against transformers' `generate`. Random weights end no response and are sure
of nothing, so every sequence has full length and dynamic decoding would keep a token a forward.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import REPOSITORY

TOKENIZER = REPOSITORY / "examples/tiny/qwen3"


def qwen3(
    layers: int, hidden: int, heads: int, groups: int, ffn: int, *, tied: bool, **moe: int
) -> dict[str, Any]:
    """The config.json of a Qwen3 model, with the special tokens of the tiny tokenizer."""
    return {
        "model_type": "qwen3_moe" if moe else "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 128,
        "intermediate_size": ffn,
        "vocab_size": 151_936,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "eos_token_id": 510,
        "pad_token_id": 508,
        **moe,
    }


REAL_SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_0.6b": qwen3(28, 1024, 16, 8, 3072, tied=True),
    "qwen3_1.7b": qwen3(28, 2048, 16, 8, 6144, tied=True),
    "qwen3_4b": qwen3(36, 2560, 32, 8, 9728, tied=True),
    "qwen3_8b": qwen3(36, 4096, 32, 8, 12288, tied=False),
    "qwen3_30b_a3b": qwen3(
        *(48, 2048, 32, 4, 6144),
        tied=False,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
}
SHAPES = {"tiny": json.loads((TOKENIZER / "config.json").read_text()), **REAL_SHAPES}


@dataclass(frozen=True)
class Load:
    """How much is measured.

    Attributes:
        device: `cpu` or `cuda`.
        rollouts: Of training; the first one warms up.
        sequences: Decoded at once, and the prompts of a rollout.
        response_length: Tokens of every response.
    """

    device: str = "cuda"
    rollouts: int = 4
    sequences: int = 32
    response_length: int = 256


def measure(shape: str, load: Load) -> dict[str, Any]:
    """Training and rollout of one shape."""
    backends = ["flex", "sdpa"] if load.device == "cuda" else ["sdpa"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder / "model", SHAPES[shape], load.device)
        write_prompts(folder / "prompts.jsonl", load.rollouts * load.sequences)
        training: dict[str, Any] = {
            backend: measure_training(folder, backend, load) for backend in backends
        }
        if len(backends) == 2:
            flex, sdpa = (training[name]["update_seconds"] for name in backends)
            training["flex_over_sdpa_seconds"] = flex / sdpa
        return {"training": training, "rollout": measure_rollout(folder, load)}


def write_model(folder: Path, config: dict[str, Any], device: str) -> None:
    """Save random weights in bfloat16 as a Hugging Face folder, with the tiny tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), dtype=torch.bfloat16
        )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)


def write_prompts(path: Path, count: int) -> None:
    """Write word problems with their answers."""
    from megatron_dlm.data.arithmetic import write_examples

    write_examples(path, "train", 1, count)


def call(*arguments: object) -> None:
    """Run a script of the repository in a process of its own."""
    subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *_python_path()])},
        check=True,
    )


def _python_path() -> list[str]:
    path = os.environ.get("PYTHONPATH")
    return [path] if path else []


def measure_training(folder: Path, backend: str, load: Load) -> dict[str, float]:
    """Medians over the updates and rollouts after the first rollout, of a run of `opdlm`."""
    run = folder / f"run_{backend}"
    arguments: dict[str, object] = {
        "objective": "opdlm",
        "load": folder / "model",
        "teacher-load": folder / "model",
        "prompts": folder / "prompts.jsonl",
        "save": run,
        "num-rollouts": load.rollouts,
        "rollout-batch-size": load.sequences,
        "max-running-requests": load.sequences,
        "global-batch-size": max(1, load.sequences // 4),
        "micro-batch-size": 1,
        "max-prompt-length": 128,
        "max-response-length": load.response_length,
        "lr": 1e-6,
        "log-interval": 1,
        "device": load.device,
        "attention-backend": backend,
    }
    flags = [part for name, value in arguments.items() for part in (f"--{name}", value)]
    call("pretrain_opdlm.py", *flags, "--bf16", "--no-tensorboard")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if line["rollout"] > 1]
    times = [line["time"] for line in updates]
    rollouts = [line for line in updates if line["time"]["rollout"] > 0]  # their first updates
    update = statistics.median(time["student"] + time["optimizer"] for time in times)
    rollout = statistics.median(line["time"]["rollout"] for line in rollouts)
    tokens = statistics.median(line["response_length"] for line in rollouts) * load.sequences
    supervised = statistics.median(line["supervised_tokens"] for line in updates)
    return {
        "update_seconds": update,
        "supervised_tokens_per_second": supervised / update,
        "teacher_seconds": statistics.median(line["time"]["teacher"] for line in rollouts),
        "rollout_seconds": rollout,
        "rollout_tokens_per_second": tokens / rollout,
    }


def measure_rollout(folder: Path, load: Load) -> dict[str, float]:
    """Tokens per second of decoding settings, and their ratios; the first setting warms up."""
    output = folder / "rollout.json"
    settings = ("dynamic:0.9", "autoregressive", "static", "static:1")
    call(
        *("tools/evaluate.py", "--load", folder / "model", "--output", output),
        *("--data", folder / "prompts.jsonl", "--max-examples", load.sequences),
        *("--max-running-requests", load.sequences, "--settings", ",".join(settings)),
        *("--max-response-length", load.response_length, "--block-size", 4),
        *("--device", load.device, "--bf16"),
    )
    results = json.loads(output.read_text())["settings"]
    speeds = {
        name: rates["mean_response_length"] * rates["total"] / rates["seconds"]
        for name, rates in results.items()
        if not name.startswith("dynamic")
    }
    speeds["transformers_autoregressive"] = transformers_speed(folder, load)
    baseline = speeds["autoregressive"]
    return {
        **{f"{name}_tokens_per_second": speed for name, speed in speeds.items()},
        "static_over_autoregressive": speeds["static"] / baseline,
        "static_1_over_autoregressive": speeds["static_1"] / baseline,
        "autoregressive_over_transformers": baseline / speeds["transformers_autoregressive"],
    }


def transformers_speed(folder: Path, load: Load) -> float:
    """Tokens per second of transformers' `generate` on the same prompts, once it is warm."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    model.to(load.device).eval()
    lines = (folder / "prompts.jsonl").read_text().splitlines()[: load.sequences]
    prompts = tokenizer.apply_chat_template(
        [json.loads(line)["messages"] for line in lines],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    ).to(load.device)

    def generate(length: int) -> float:
        started = time.perf_counter()
        model.generate(**prompts, min_new_tokens=length, max_new_tokens=length, do_sample=False)
        if load.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    generate(8)
    return load.sequences * load.response_length / generate(load.response_length)
