"""Held-out prompts are answered as `megatron-dlm evaluate` does, and training is not affected."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm.commands import main
from megatron_dlm.errors import UserError
from megatron_dlm.training.held_out_evaluation import SAMPLES
from megatron_dlm.training.inputs import read_inputs
from tests.tiny import (
    declare_diffusion_kind,
    reward_every_third,
    run_config,
    run_training,
    save_random_model,
    write_data,
)

NUM_PROMPTS = 5
EVALUATED: dict[str, Any] = dict(
    eval_prompts_interval=1, eval_num_prompts=NUM_PROMPTS, eval_max_response_length=12
)
ROLLOUTS: dict[str, Any] = dict(rollout_batch_size=8, max_response_length=8)

RUNS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "opdlm": (ROLLOUTS, ["static:2", "dynamic:0.3@8", "autoregressive"]),
    "d_opsd": (dict(ROLLOUTS, lora_rank=2, lora_dropout=0.1, max_tries=1), ["dynamic:0.3"]),
    "off_policy": (dict(train_iters=2, max_response_length=8), ["entropy:2"]),
    "scp": (dict(train_iters=2), ["static@4"]),
    "next_token": (dict(train_iters=2), []),
}
"""Runs of two updates by objective, with decoding settings."""

COMPARED = ("opdlm", "d_opsd")
"""Those that are trained without evaluations too; test_validation.py has `scp`."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held_out")
    write_data(folder)
    write_data(folder / "held_out", 8, "heldout")
    for name in ("dense", "diffusion"):
        save_random_model(folder / name)
    declare_diffusion_kind(folder / "diffusion", "block_causal", shifted=False)
    return folder


def held_out(folder: Path) -> str:
    return str(folder / "held_out" / "prompts.jsonl")


def trained(line: dict[str, Any]) -> dict[str, Any]:
    """What an update's metrics say of the training."""
    return {k: v for k, v in line.items() if k not in ("time", "throughput", "evaluation")}


@pytest.mark.parametrize("objective", RUNS)
@pytest.mark.slow
def test_answers_are_those_of_the_command(folder: Path, tmp_path: Path, objective: str) -> None:
    """Of the checkpoint that is saved after the same update."""
    options, decodings = RUNS[objective]
    model = folder / ("diffusion" if objective == "d_opsd" else "dense")
    options = {**options, "objective": objective}
    evaluated = dict(EVALUATED, eval_prompts=held_out(folder), eval_decodings=decodings)
    with reward_every_third():
        lines = run_training(
            run_config(folder, model, **options, **evaluated, save=str(tmp_path / "run"))
        )
        if objective in COMPARED:
            plain = run_training(run_config(folder, model, **options, save=str(tmp_path / "plain")))
            assert [trained(line) for line in lines] == [trained(line) for line in plain]
            assert not any("evaluation" in {**line, **line["time"]} for line in plain)

        results = tmp_path / "results.json"
        command = ["evaluate", "--load", str(tmp_path / "run"), "--data", held_out(folder)]
        command += ["--max-examples", str(NUM_PROMPTS), "--max-response-length", "12"]
        command += ["--temperature", "1", "--device", "cpu", "--output", str(results)]
        assert main([*command, *(["--settings", ",".join(decodings)] if decodings else [])]) == 0
    answered = json.loads(results.read_text())["settings"]
    rates = lines[-1]["evaluation"]
    assert list(rates) == list(answered)
    for name, rate in rates.items():
        assert rate == {key: answered[name][key] for key in rate}, name
    correct = [rate["correct"] for rate in rates.values()]
    assert any(0 < number < NUM_PROMPTS for number in correct), correct  # some right, some wrong

    shown = _lines(tmp_path / "run" / "evaluation_samples.jsonl")
    responses = _lines(tmp_path / "results.responses.jsonl")
    last = [line for line in shown if line["step"] == 2]
    assert [line["step"] for line in shown] == [1] * len(last) + [2] * len(last)
    assert len(last) == SAMPLES * len(rates)
    for line in last:
        [wanted] = [
            response
            for response in responses
            if (response["setting"], response["sample_index"]) == (line["decoding"], line["sample"])
        ]
        assert (line["response"], line["reward"]) == (wanted["text"], wanted["reward"])
        assert line["correct"] == (line["reward"] == 1)
        assert line["reference"] == wanted["record"]["answer"]
        assert wanted["record"]["messages"][0]["content"] in line["prompt"]


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"eval_num_prompts": 9}, ["--eval-num-prompts = 9: ", "has 8; choose 8 or less"]),
        ({"eval_decodings": ["fast"]}, ["--eval-decodings = 'fast': is no decoding setting"]),
        ({"eval_decodings": ["static:3"]}, ["--eval-decodings = 'static:3'", "1, 2 or 4"]),
        ({"eval_decodings": ["dynamic", "dynamic:0.9"]}, ["names dynamic_0.9 twice"]),
        (
            {"objective": "next_token", "eval_decodings": ["static"]},
            ["--eval-decodings = 'static'", "left to right", "choose autoregressive"],
        ),
        (
            {"eval_max_response_length": 250},
            ["--eval-max-response-length = 250: after the longest prompt", "of the model's 256"],
        ),
        (
            {"objective": "scp", "max_response_length": 250},
            ["--max-response-length = 250", "add --eval-max-response-length"],
        ),
        (
            {"max_total_tokens": 16, "eval_decodings": ["static@16"]},
            ["--max-total-tokens = 16: has no room", "under static@16", "or more"],
        ),
        ({"reward": "choice"}, ["prompts.jsonl", "reward 'choice' cannot read it"]),
        ({"reward": "no.module:here"}, ["--reward = 'no.module:here': cannot be imported"]),
        ({"eval_prompts": "unanswered.jsonl"}, ["unanswered.jsonl", "reward 'exact_match' needs"]),
        ({"eval_prompts": "nowhere.jsonl"}, ["--eval-prompts = ", "nowhere.jsonl"]),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_built(
    folder: Path, options: dict[str, Any], named: list[str]
) -> None:
    unanswered = folder / "unanswered.jsonl"
    unanswered.write_text('{"prompt": "How many?"}\n')
    values = {"eval_prompts": held_out(folder), **options}
    values["eval_prompts"] = str(folder / values["eval_prompts"])
    with pytest.raises(UserError) as refused:
        read_inputs(run_config(folder, folder / "dense", **values))
    message = str(refused.value)
    assert "\n" not in message
    assert all(part in message for part in named), message
