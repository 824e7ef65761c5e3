"""The tools that generate: against transformers, against each other, and under parallel layouts."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from megatron_dlm.data.arithmetic import write_examples
from tests.functional_tests.entry_points import (
    CONVERT,
    EVALUATE,
    GENERATE,
    Call,
    lines,
    run_process,
    run_ranks,
)
from tests.tiny import TOKENIZER, save_random_model, write_data

LENGTH = 12
COMMON = ("--max-response-length", LENGTH, "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools")
    write_data(folder, 7)
    save_random_model(folder / "dense")
    save_random_model(folder / "moe", moe=True)
    return folder


def greedy_responses(model_folder: Path, prompts: Path) -> Iterator[str]:
    """What transformers answers."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    for record in lines(prompts):
        token_ids = tokenizer.apply_chat_template(
            record["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        generated = model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=LENGTH,
            do_sample=False,
        )
        yield tokenizer.decode(generated[0, token_ids.shape[1] :], skip_special_tokens=True)


def test_autoregressive_responses_are_those_of_transformers(folder: Path, call: Call) -> None:
    prompts, output = folder / "prompts.jsonl", folder / "autoregressive.jsonl"
    arguments = ("--load", folder / "dense", "--prompts", prompts, "--output", output, *COMMON)
    outcome = call(GENERATE, *arguments, "--max-running-requests", 3)
    assert (outcome.status, outcome.stdout, outcome.stderr) == (0, "", "")
    written = lines(output)
    assert [line["messages"] for line in written] == [line["messages"] for line in lines(prompts)]
    assert [line["response"] for line in written] == list(
        greedy_responses(folder / "dense", prompts)
    )
    assert all(line["tokens_per_forward"] == 1.0 for line in written)


def test_one_prompt_prints_its_response(folder: Path, call: Call) -> None:
    record = lines(folder / "prompts.jsonl")[0]
    expected = next(greedy_responses(folder / "dense", folder / "prompts.jsonl"))
    text = record["messages"][0]["content"]
    arguments = ("--load", folder / "dense", "--prompt", text, *COMMON)
    assert call(GENERATE, *arguments).stdout == expected + "\n"
    assert call(GENERATE, *arguments, "--no-chat").stdout != expected + "\n"


def test_block_size_comes_from_the_checkpoint(folder: Path, call: Call, tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"block_size": 4}))
    arguments = ("--load", model, "--prompts", folder / "prompts.jsonl", *COMMON)
    from_checkpoint = call(GENERATE, *arguments)
    assert from_checkpoint.status == 0
    given = ("--load", folder / "dense", *arguments[2:], "--block-size", 4)
    assert call(GENERATE, *given).stdout == from_checkpoint.stdout
    assert call(GENERATE, *given[:-1], 2).stdout != from_checkpoint.stdout
    assert call(GENERATE, *arguments, "--decoding", "autoregressive").stdout == (
        call(GENERATE, *("--load", folder / "dense", *arguments[2:])).stdout
    )


def test_domains_are_those_of_training(folder: Path, call: Call, tmp_path: Path) -> None:
    """Suffixes as if they were written in the file, and the longest responses."""
    suffixes, limits = {"math": " How many?", "default": ""}, {"math": 3, "default": 7}
    records = lines(folder / "examples.jsonl")
    for index, record in enumerate(records):
        record["kind"] = ("math", "code", None)[index % 3]
    data, written_out = tmp_path / "data.jsonl", tmp_path / "written_out.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    for record in records:
        message = record["messages"][0]
        message["content"] += suffixes["math"] if record["kind"] == "math" else ""
    written_out.write_text("".join(json.dumps(record) + "\n" for record in records))

    model = ("--load", folder / "dense", "--block-size", 4, *COMMON)
    options = (
        *("--domain-field", "kind", "--prompt-suffix-by-domain", json.dumps(suffixes)),
        *("--max-response-length-by-domain", json.dumps(limits)),
    )
    output, one_limit = tmp_path / "output.jsonl", tmp_path / "one_limit.jsonl"
    outcome = call(GENERATE, *model, "--prompts", data, "--output", output, *options)
    assert outcome.status == 0, outcome.stderr
    expected = {}
    for limit in limits.values():
        arguments = (*model, "--max-response-length", limit, "--prompts", written_out)
        assert call(GENERATE, *arguments, "--output", one_limit).status == 0
        expected[limit] = [line["response"] for line in lines(one_limit)]
    lengths = [limits["math" if r["kind"] == "math" else "default"] for r in records]
    assert [line["response"] for line in lines(output)] == [
        expected[length][index] for index, length in enumerate(lengths)
    ]

    results = tmp_path / "results.json"
    outcome = call(EVALUATE, *model, "--data", data, "--output", results, *options)
    assert outcome.status == 0, outcome.stderr
    [result] = json.loads(results.read_text())["settings"].values()
    assert result["mean_response_length"] == pytest.approx(sum(lengths) / len(lengths), abs=1e-3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--prompt-suffix-by-domain", '{"math": " ?"}'), ['prompts.jsonl:1: "domain" = None']),
        (("--max-response-length-by-domain", '{"math": 0}'), ["by-domain.math = 0"]),
        (("--domain-field", "kind"), ["--domain-field = 'kind'", "--prompt-suffix-by-domain"]),
    ],
)
def test_domains_that_cannot_be_are_refused(
    folder: Path, call: Call, options: tuple[str, ...], named: list[str]
) -> None:
    arguments = ("--load", folder / "dense", "--prompts", folder / "prompts.jsonl", *COMMON)
    outcome = call(GENERATE, *arguments, *options)
    assert outcome.status == 2
    for words in named:
        assert words in outcome.stderr


def test_evaluation_counts_what_generation_writes(folder: Path, call: Call, tmp_path: Path) -> None:
    data, results = folder / "examples.jsonl", tmp_path / "results.json"
    static = ("--remasking-strategy", "low_confidence_static")
    settings: dict[str, tuple[object, ...]] = {
        "static": static,
        "static_1": (*static, "--denoising-steps-per-block", 1),
        "dynamic_0.2": ("--dynamic-threshold", 0.2),
        "autoregressive": ("--decoding", "autoregressive"),
    }
    model = ("--load", folder / "dense", "--block-size", 4, *COMMON)
    outcome = call(
        EVALUATE,
        *(*model, "--data", data, "--output", results, "--max-examples", 5),
        *("--settings", "static,static:1,dynamic:0.2,autoregressive"),
    )
    assert outcome.status == 0, outcome.stderr
    summary = json.loads(results.read_text())
    assert (summary["num_examples"], summary["data"]) == (5, str(data))
    assert list(summary["settings"]) == list(settings)
    for name, result in summary["settings"].items():
        assert name in outcome.stdout
        output = tmp_path / f"{name}.jsonl"
        arguments = (*model, "--prompts", data, "--output", output)
        assert call(GENERATE, *arguments, *settings[name]).status == 0
        generated = lines(output)[:5]
        # A random model does not end by itself, so that every response has the same length.
        assert [line["finish_reason"] for line in generated] == ["length"] * 5
        forwards = sum(LENGTH / line["tokens_per_forward"] for line in generated)
        assert result["tokens_per_forward"] == pytest.approx(5 * LENGTH / forwards, rel=1e-3)
        assert (result["total"], result["correct"], result["eos_rate"]) == (5, 0, 0.0)
        assert result["mean_response_length"] == LENGTH
    # Three or four blocks of four tokens, depending on where the prompt ends.
    assert 3.0 <= summary["settings"]["static_1"]["tokens_per_forward"] <= 4.0
    assert summary["settings"]["autoregressive"]["tokens_per_forward"] == 1.0


@pytest.fixture(scope="module")
def full_attention(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose config.json says how it decodes."""
    model = save_random_model(tmp_path_factory.mktemp("full") / "model")
    config = json.loads((model / "config.json").read_text())
    stated = {"attention_pattern": "full", "shifted": True}
    (model / "config.json").write_text(json.dumps(config | stated))
    return model


def test_full_attention_is_decoded_as_the_checkpoint_says(
    folder: Path, full_attention: Path, call: Call, tmp_path: Path
) -> None:
    data, results = folder / "examples.jsonl", tmp_path / "results.json"
    model = ("--load", full_attention, *COMMON)
    names = "static,static:6,entropy,entropy:3,entropy_bounded:0.5,dynamic:0.2"
    evaluate = (*model, "--data", data, "--max-examples", 4, "--output", results)
    outcome = call(EVALUATE, *evaluate, "--settings", names)
    assert outcome.status == 0, outcome.stderr
    settings = json.loads(results.read_text())["settings"]
    assert list(settings) == names.replace(":", "_").split(",")
    # A random model does not end by itself, so the whole response takes exactly these steps.
    speed = {name: result["tokens_per_forward"] for name, result in settings.items()}
    assert (speed["static"], speed["static_6"]) == (1.0, 2.0)
    assert (speed["entropy"], speed["entropy_3"]) == (1.0, 4.0)

    call(EVALUATE, *evaluate, "--settings", "static:1", "--block-size", 4)
    # Three or four blocks of four tokens, depending on where the prompt ends.
    by_blocks = json.loads(results.read_text())["settings"]["static_1"]
    assert 3.0 <= by_blocks["tokens_per_forward"] <= 4.0
    # A whole block takes three steps; where the prompt ends inside one, twelve tokens take ten.
    call(EVALUATE, *evaluate, "--settings", "entropy:3", "--block-size", 4)
    in_threes = json.loads(results.read_text())["settings"]["entropy_3"]
    assert 12 / 10 - 1e-6 <= in_threes["tokens_per_forward"] <= 12 / 9 + 1e-6
    call(EVALUATE, *evaluate, "--settings", "static:3", "--block-size", 4).check_error(
        "--settings = 'static:3'", "block size 4"
    )
    call(EVALUATE, *evaluate, "--settings", "entropy:x").check_error(
        "entropy:<steps, [1, 1048576]>"
    )
    call(EVALUATE, *evaluate, "--settings", "entropy_bounded:-1").check_error("entropy_bounded:-1")


def test_exported_full_attention_generates_the_same_in_transformers(
    folder: Path, full_attention: Path, call: Call, tmp_path: Path
) -> None:
    exported, prompts = tmp_path / "exported", folder / "prompts.jsonl"
    outcome = call(
        CONVERT, "--load", full_attention, "--save", exported, "--target-format", "a2d-qwen3"
    )
    assert outcome.status == 0, outcome.stderr
    decoding = ("--remasking-strategy", "entropy", "--denoising-steps-per-block", 5)
    texts = [
        [json.loads(line)["response"] for line in generated.stdout.splitlines()]
        for load in (full_attention, exported)
        for generated in [call(GENERATE, "--load", load, "--prompts", prompts, *COMMON, *decoding)]
    ]
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForMaskedLM.from_pretrained(exported, trust_remote_code=True).eval()
    expected = []
    for record in lines(prompts):
        token_ids = tokenizer.apply_chat_template(
            record["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        generated = model.generate(token_ids, max_new_tokens=LENGTH, denoising_steps=5)
        response = generated[0, token_ids.shape[1] :]
        expected.append(tokenizer.decode(response, skip_special_tokens=True))
    assert len(expected) == 7
    assert texts == [expected, expected]


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("dense", ()),
        ("dense", ("--pipeline-model-parallel-size", 2)),
        ("moe", ("--expert-model-parallel-size", 2)),
    ],
    ids=["DP2 under torchrun", "PP2", "EP2"],
)
def test_layouts_generate_the_same(
    folder: Path, call: Call, model: str, layout: tuple[object, ...]
) -> None:
    arguments = (
        *("--load", folder / model, "--prompts", folder / "prompts.jsonl", *COMMON),
        *("--block-size", 4, "--temperature", 1, "--max-running-requests", 2),
    )
    single = call(GENERATE, *arguments)
    assert len(single.stdout.splitlines()) == 7
    if layout:
        parallel = run_ranks(2, "generate", *arguments, *layout)
    else:
        parallel = run_process(GENERATE, *arguments, processes=2)
    assert parallel.status == 0, parallel.stderr
    assert parallel.stdout == single.stdout


def test_evaluation_on_two_processes(folder: Path, call: Call, tmp_path: Path) -> None:
    arguments = (
        *("--load", folder / "dense", "--data", folder / "examples.jsonl", *COMMON),
        *("--settings", "dynamic:0.2,autoregressive", "--block-size", 4),
    )
    single, parallel = tmp_path / "single.json", tmp_path / "parallel.json"
    assert call(EVALUATE, *arguments, "--output", single).status == 0
    assert run_ranks(2, "evaluate", *arguments, "--output", parallel).status == 0
    expected, found = (json.loads(file.read_text()) for file in (single, parallel))
    for summary in (expected, found):
        del summary["seconds"]
        for result in summary["settings"].values():
            assert result.pop("seconds") > 0
            assert result.pop("tokens_per_second") > 0
    assert found == expected


def test_evaluation_of_the_tiny_teacher(call: Call, tmp_path: Path) -> None:
    """A trained model's answers are recognised as right: the committed teacher solves problems."""
    data, results = tmp_path / "heldout.jsonl", tmp_path / "results.json"
    write_examples(data, "heldout", 3, 24)
    outcome = call(
        EVALUATE,
        *("--load", TOKENIZER, "--data", data, "--output", results, "--block-size", 4),
        *("--settings", "autoregressive,static", "--max-response-length", 64, "--device", "cpu"),
    )
    assert outcome.status == 0, outcome.stderr
    settings = json.loads(results.read_text())["settings"]
    assert settings["autoregressive"]["accuracy"] >= 0.9
    assert settings["static"]["accuracy"] <= 0.25  # not converted yet
