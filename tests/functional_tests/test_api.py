"""The Python interface gives what the commands give, in one process, again and again."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

import megatron_dlm
from megatron_dlm.errors import UserError
from tests.functional_tests.entry_points import (
    CONVERT,
    EVALUATE,
    GENERATE,
    PRETRAIN,
    Call,
    lines,
)
from tests.refusal import refusal
from tests.tiny import run_config, save_random_model, write_data

LENGTH = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    write_data(folder, 7)
    save_random_model(folder / "model")
    return folder


@pytest.mark.parametrize(
    "decoding",
    [{}, {"block_size": 4}, {"block_size": 4, "temperature": 1.0, "seed": 7}],
    ids=["autoregressive", "diffusion", "drawn"],
)
def test_responses_are_those_of_the_command(folder: Path, call: Call, decoding) -> None:
    options = dict(decoding, max_response_length=LENGTH)
    output, prompts = folder / "responses.jsonl", folder / "prompts.jsonl"
    flags = [text for n, v in options.items() for text in ("--" + n.replace("_", "-"), v)]
    arguments = ("--load", folder / "model", "--prompts", prompts, "--output", output)
    assert call(GENERATE, *arguments, *flags, "--device", "cpu").status == 0
    random_state = torch.random.get_rng_state()
    with megatron_dlm.load(folder / "model", device="cpu") as model:
        of_file = megatron_dlm.generate(model, prompts, **options)
        of_records = megatron_dlm.generate(model, lines(prompts), **options)
    assert of_file == of_records
    for response, record in zip(of_file, lines(output), strict=True):
        assert response.text == record["response"]
        assert response.finish_reason == record["finish_reason"]
        assert round(response.tokens_per_forward, 4) == record["tokens_per_forward"]
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_settings_are_those_of_evaluation(folder: Path, call: Call) -> None:
    output = folder / "results.json"
    arguments = ("--load", folder / "model", "--data", folder / "prompts.jsonl", "--output", output)
    settings = ("--settings", "static:2,dynamic:0.3", "--block-size", 4)
    length = ("--max-response-length", LENGTH, "--device", "cpu")
    assert call(EVALUATE, *arguments, *settings, *length).status == 0
    results = json.loads(output.read_text())["settings"]
    with megatron_dlm.load(folder / "model", block_size=4, device="cpu") as model:
        for setting, name in (("static:2", "static_2"), ("dynamic:0.3", "dynamic_0.3")):
            responses = megatron_dlm.generate(
                model, folder / "prompts.jsonl", setting=setting, max_response_length=LENGTH
            )
            tokens = sum(len(response.token_ids) for response in responses)
            forwards = sum(len(r.token_ids) / r.tokens_per_forward for r in responses)
            expected = results[name]["tokens_per_forward"]
            assert tokens / forwards == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("objective", ["sft", "next_token"])
def test_loss_is_the_validation_loss_of_training(folder: Path, call: Call, objective: str) -> None:
    block = {"block_size": 4} if objective == "sft" else {}
    examples = folder / "examples.jsonl"
    options = dict(objective=objective, valid_data=str(examples), eval_iters=7, global_batch_size=1)
    config = run_config(folder, folder / "model", **options, **block, train_iters=2)
    file = folder / f"{objective}.yaml"
    run = folder / objective
    file.write_text(config.to_yaml())
    trained = call(PRETRAIN, "--config", file, "--save", run)
    assert trained.status == 0, trained.stderr
    expected = lines(run / "metrics.jsonl")[-1]["validation_loss"]
    with megatron_dlm.load(run, device="cpu") as model:
        of_file = megatron_dlm.loss(model, examples, objective=objective)
        of_records = megatron_dlm.loss(model, lines(examples), objective=objective)
    assert of_file == of_records == pytest.approx(expected, rel=1e-6)


def test_converted_folder_is_that_of_the_command(folder: Path, call: Call) -> None:
    options = ("--target-format", "sdar", "--block-size", 4, "--device", "cpu")
    assert call(CONVERT, "--load", folder / "model", "--save", folder / "cli", *options).status == 0
    # While a model is open, whose groups the conversion uses.
    with megatron_dlm.load(folder / "model", device="cpu"):
        written = megatron_dlm.convert(folder / "model", folder / "api", block_size=4, device="cpu")
        assert parallel_state.model_parallel_is_initialized()
    assert written == folder / "api"
    files = sorted(path.name for path in written.iterdir())
    assert files == sorted(path.name for path in (folder / "cli").iterdir())
    for name in files:
        of_command = (folder / "cli" / name).read_bytes()
        if name == "README.md":  # its title is the folder's name
            of_command = of_command.replace(b"# cli\n", b"# api\n")
        assert (written / name).read_bytes() == of_command, name


def test_groups_go_with_the_last_model(folder: Path) -> None:
    first = megatron_dlm.load(folder / "model", device="cpu")
    second = megatron_dlm.load(folder / "model", device="cpu", block_size=4)
    [before] = megatron_dlm.generate(second, "How many?", max_response_length=4)
    first.close()
    first.close()
    assert megatron_dlm.generate(second, ["How many?"], max_response_length=4) == [before]
    with pytest.raises(UserError, match="is closed; load it again"):
        megatron_dlm.generate(first, "How many?")
    del second
    gc.collect()
    assert not parallel_state.model_parallel_is_initialized()
    assert not torch.distributed.is_initialized()


def test_errors_are_those_of_the_commands(
    folder: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, generate, model = megatron_dlm.load, megatron_dlm.generate, folder / "model"
    missing = refusal(load, folder / "none")
    call(GENERATE, "--load", folder / "none", "--prompt", "?").check_error(str(missing))
    assert "did you mean block_size?" in str(refusal(lambda: load(model, blok_size=4)))
    assert not parallel_state.model_parallel_is_initialized()
    with load(model, device="cpu") as loaded:
        for ask, text in (
            (lambda: generate(loaded, "?", bf16=True), "bf16 = True: is the model's; give it to "),
            (lambda: generate(loaded, []), "is empty; give one or more"),
            (lambda: generate(loaded, [{"text": "?"}]), "prompts:1"),
            (lambda: generate(loaded, [{"prompt": {1}}]), "cannot be written as JSON"),
            (lambda: generate(loaded, "?", setting="static"), "add --block-size"),
            (lambda: megatron_dlm.loss(loaded, [], objective="opdlm"), "choose sft or next_token"),
            (lambda: megatron_dlm.loss(loaded, [{"prompt": "?"}]), "examples:1"),
            (lambda: megatron_dlm.convert(model, model), "already exists; name a new folder"),
        ):
            assert text in str(refusal(ask))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "for one process; run the commands under torchrun" in str(refusal(load, model))


def test_import_is_light() -> None:
    check = "import megatron_dlm, sys; assert not {'torch', 'megatron', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
