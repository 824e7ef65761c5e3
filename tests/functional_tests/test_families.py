"""Commands and Python interface on models other than Qwen3's: transformers is the oracle."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import megatron_dlm
from tests.functional_tests.entry_points import CONVERT, EVALUATE, GENERATE, Call
from tests.tiny import declare_diffusion_kind, save_random_model, write_data

LENGTH = 8
FAMILIES = ("qwen2", "llama", "mistral")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompt_ids(tokenizer: Any, record: dict[str, Any]) -> Tensor:
    ids: Tensor = tokenizer.apply_chat_template(
        record["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    return ids


def responses_of_transformers(folder: Path, prompts: Path, **options: Any) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    texts = []
    for record in lines(prompts):
        ids = prompt_ids(tokenizer, record)
        generated = model.generate(ids, max_new_tokens=LENGTH, do_sample=False, **options)
        texts.append(tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def check_answers(call: Call, model: Path, data: Path, expected: list[str], setting: str) -> None:
    """Both commands decode the folder as its config.json says."""
    output, results = data / "responses.jsonl", data / "results.json"
    common = ("--load", model, "--max-response-length", LENGTH, "--device", "cpu")
    outcome = call(GENERATE, *common, "--prompts", data / "prompts.jsonl", "--output", output)
    assert outcome.status == 0, outcome.stderr
    assert [line["response"] for line in lines(output)] == expected
    outcome = call(EVALUATE, *common, "--data", data / "prompts.jsonl", "--output", results)
    assert outcome.status == 0, outcome.stderr
    [(name, result)] = json.loads(results.read_text())["settings"].items()
    rates = [line["tokens_per_forward"] for line in lines(output)]
    assert (name, result["total"], result["mean_response_length"]) == (setting, 5, LENGTH)
    rate = len(rates) / sum(1 / rate for rate in rates)  # every response has the same length
    assert result["tokens_per_forward"] == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_of_a_family_are_answered_with(family: str, call: Call, tmp_path: Path) -> None:
    write_data(tmp_path, 5)
    model = save_random_model(tmp_path / "model", family=family)
    prompts = tmp_path / "prompts.jsonl"
    expected = responses_of_transformers(model, prompts)
    check_answers(call, model, tmp_path, expected, "autoregressive")

    declare_diffusion_kind(model, "block_causal", shifted=False)
    exported = tmp_path / "exported"
    outcome = call(CONVERT, "--load", model, "--save", exported)
    assert outcome.status == 0, outcome.stderr
    assert f"a2d-{family}" in outcome.stdout
    by_blocks = responses_of_transformers(exported, prompts)
    assert by_blocks != expected
    check_answers(call, exported, tmp_path, by_blocks, "dynamic_0.9")


@pytest.mark.parametrize("family", FAMILIES)
def test_python_interface_knows_a_family(family: str, tmp_path: Path) -> None:
    write_data(tmp_path, 5)
    model = save_random_model(tmp_path / "model", family=family)
    theirs = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    total, tokens = 0.0, 0
    for record in lines(tmp_path / "examples.jsonl"):
        prompt = prompt_ids(tokenizer, record)
        ids = tokenizer(record["response"], add_special_tokens=False)["input_ids"]
        response = torch.tensor([[*ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = theirs(torch.cat((prompt, response), dim=1)).logits
        predictions = logits[:, prompt.shape[1] - 1 : -1]
        total -= predictions.log_softmax(-1).gather(-1, response[..., None]).sum().item()
        tokens += response.numel()
    with megatron_dlm.load(model, device="cpu") as ours:
        found = megatron_dlm.generate(ours, tmp_path / "prompts.jsonl", max_response_length=LENGTH)
        loss = megatron_dlm.loss(ours, tmp_path / "examples.jsonl", objective="next_token")
        by_blocks = megatron_dlm.loss(ours, tmp_path / "examples.jsonl", block_size=4)
    expected = responses_of_transformers(model, tmp_path / "prompts.jsonl")
    assert [response.text for response in found] == expected
    assert loss == pytest.approx(total / tokens, rel=1e-5)
    assert math.isfinite(by_blocks)
    written = megatron_dlm.convert(model, tmp_path / "hf", format="autoregressive", device="cpu")
    again = AutoModelForCausalLM.from_pretrained(written).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=0, atol=0)
