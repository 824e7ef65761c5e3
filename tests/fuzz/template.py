"""The small runs whose files are modified."""

from pathlib import Path
from typing import Any

import yaml

from tests.tiny import save_random_model, write_data

RUNS = ("opdlm", "sft", "scp")
"""Runs that read prompts, examples and a corpus; `NAME.yaml` is the configuration of one."""


def write_runs(folder: Path) -> None:
    """Write a model, data and configurations that work; paths in them are relative to `folder`."""
    folder.mkdir(parents=True)
    save_random_model(folder / "dense")
    write_data(folder, 6)
    common: dict[str, Any] = {
        "load": "dense",
        "global_batch_size": 4,
        "param_groups": [{"pattern": "attention", "lr": 1e-4}],
        "device": "cpu",
    }
    texts = {"max_prompt_length": 128, "chat_template_kwargs": {"enable_thinking": False}}
    rollouts = {"num_rollouts": 1, "rollout_batch_size": 4, "max_response_length": 8}
    updates = {"train_iters": 2, "eval_iters": 1}
    runs: dict[str, dict[str, Any]] = {
        "opdlm": {"prompts": "prompts.jsonl", **rollouts, **texts},
        "sft": {
            "train_data": "examples.jsonl",
            "valid_data": "examples.jsonl",
            **updates,
            **texts,
        },
        "scp": {
            "data_path": "corpus",
            "valid_data_path": "corpus_heldout",
            "seq_length": 32,
            **updates,
        },
    }
    for name, values in runs.items():
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"objective": name, **common, **values}))
