"""The small run whose files are made odd."""

from pathlib import Path

import yaml

from tests.tiny import save_random_model, write_data


def write_run(folder: Path) -> None:
    """Write a model, prompts and a configuration that work; paths in it are relative to it."""
    folder.mkdir(parents=True)
    save_random_model(folder / "dense")
    write_data(folder, 6)
    values = {
        "load": "dense",
        "prompts": "prompts.jsonl",
        "num_rollouts": 1,
        "rollout_batch_size": 4,
        "global_batch_size": 4,
        "max_prompt_length": 128,
        "max_response_length": 8,
        "chat_template_kwargs": {"enable_thinking": False},
        "param_groups": [{"pattern": "attention", "lr": 1e-4}],
        "device": "cpu",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
