"""The lines before a run tell its sizes, and fit the terminal."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from megatron_dlm.models.architecture import parameter_counts
from megatron_dlm.terminal import COLUMNS, wrapped
from megatron_dlm.training.start_summary import start_summary
from tests.tiny import run_config, save_random_model, started_inputs, write_data


@pytest.mark.parametrize(
    ("options", "world_size", "expected"),
    [
        ({}, 1, {"data": "48 records of", "layout": "1 process, fp32, updates of 4 samples"}),
        (
            dict(
                tensor_model_parallel_size=2,
                sequence_parallel=True,
                use_distributed_optimizer=True,
                global_batch_size=8,
            ),
            4,
            {"layout": "4 processes (tensor 2, data 2), fp32", "memory": "teacher"},
        ),
        (
            dict(bf16=True, teacher_precision="fp8", offload_teacher=True, offload_optimizer=True),
            1,
            {"offload": "gradients and optimizer and teacher: not on the device while unused"},
        ),
        (
            dict(context_parallel_size=2, rollout_context_parallel="tokens", micro_batch_size=4),
            2,
            {"layout": "2 processes (context 2), fp32", "decoding": "2 processes share each"},
        ),
        (
            dict(objective="scp", eval_prompts="prompts.jsonl", eval_max_response_length=9),
            1,
            {"folder": "a new run", "held-out": "48 prompts of"},
        ),
    ],
    ids=["opdlm", "layout", "offload", "context", "scp"],
)
def test_summary(
    tmp_path: Path, options: dict[str, Any], world_size: int, expected: dict[str, str]
) -> None:
    folder = tmp_path / ("long_" * 20)
    write_data(folder)
    moe = "layout" in expected and world_size == 4
    model = save_random_model(folder / "model", moe=moe)
    if "eval_prompts" in options:
        options = {**options, "eval_prompts": str(folder / options["eval_prompts"])}
    config, inputs = started_inputs(run_config(folder, model, **options))
    lines = dict(line.split(maxsplit=1) for line in start_summary(config, inputs, world_size))
    assert max(map(len, start_summary(config, inputs, world_size))) <= COLUMNS
    for name, text in expected.items():
        assert text in lines[name]
    loaded = AutoModelForCausalLM.from_pretrained(model)
    dense, experts = parameter_counts(inputs.architecture)
    own = list(loaded.named_parameters())
    assert dense + experts == sum(parameter.numel() for _, parameter in own)
    assert experts == sum(parameter.numel() for name, parameter in own if ".experts." in name)
    if "bf16" in options:  # each weight of a layer in a byte, the tables in two
        tables = sum(p.numel() for name, p in own if "embed" in name or "lm_head" in name)
        found = float(lines["memory"].split("teacher ")[1].split(" MB")[0])
        assert found == pytest.approx((dense + tables) / 1e6, abs=0.006)
        assert f"weights {2 * dense / 1e6:.2f} MB" in lines["memory"]
    elif world_size < 4:
        assert f"weights {4 * (dense + experts) / 1e6:.2f} MB" in lines["memory"]
    else:  # experts are split by tensor parallelism too; a half of the optimizer's state each
        share = (dense + experts) // 2
        assert f"optimizer {8 * share / 2 / 1e6:.2f} MB" in lines["memory"]


def test_lines_wrap_between_parts() -> None:
    parts = [f"part {i} is of some length" for i in range(9)]
    lines = wrapped(parts).split("\n")
    assert max(map(len, lines)) <= COLUMNS
    assert " | ".join(line.strip() for line in lines) == " | ".join(parts)
    assert len(lines) == 3
