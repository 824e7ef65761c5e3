"""Ids without an embedding are refused before they reach a model; the error names the text."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.functional_tests.entry_points import (
    CONVERT,
    EVALUATE,
    GENERATE,
    PREPROCESS,
    PRETRAIN,
    Call,
)
from tests.tiny import TOKENIZER, run_config, save_random_model, write_data

NEW = "<|new|>"
NAMED = f"contains '{NEW}' (id 512), which is no token of the model's vocabulary of 512"
GOOD = {"messages": [{"role": "user", "content": "1 + 1"}], "response": "2", "answer": "2"}
IN_PROMPT = GOOD | {"messages": [{"role": "user", "content": f"1 {NEW} 1"}]}
IN_RESPONSE = GOOD | {"response": f"2 {NEW}"}
IN_ANSWER = {"messages": [*GOOD["messages"], {"role": "assistant", "content": NEW}]}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer knows a token more than it has, and the same without (`plain`)."""
    folder = tmp_path_factory.mktemp("token_ids")
    write_data(folder, 8)
    save_random_model(folder / "plain")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    assert tokenizer.add_tokens([NEW]) == 1
    tokenizer.save_pretrained(save_random_model(folder / "model"))
    return folder


def write(path: Path, *records: object) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def dry_run(
    files: Path, folder: Path, model: str = "model", **options: object
) -> tuple[object, ...]:
    config = run_config(files, files / model, save=str(folder / "run"), **options)
    file = folder / "run.yaml"
    file.write_text(config.to_yaml())
    return PRETRAIN, "--config", file, "--dry-run"


@pytest.mark.parametrize(
    ("option", "objective", "record", "what"),
    [
        ("prompts", "opdlm", IN_PROMPT, "the prompt"),
        ("prompts", "off_policy", IN_PROMPT, "the prompt"),
        ("train_data", "sft", IN_PROMPT, "the prompt"),
        ("train_data", "sft", IN_RESPONSE, "the response"),
        ("train_data", "next_token", IN_ANSWER, "the response"),
        ("valid_data", "sft", IN_RESPONSE, "the response"),
    ],
)
def test_training(
    files: Path,
    call: Call,
    tmp_path: Path,
    option: str,
    objective: str,
    record: dict[str, object],
    what: str,
) -> None:
    def run(*records: object) -> tuple[object, ...]:
        data = {option: str(write(tmp_path / "data.jsonl", *records))}
        data |= {"eval_iters": 1} if option == "valid_data" else {}
        return dry_run(files, tmp_path, objective=objective, **data)

    assert call(*run(*[GOOD] * 4)).status == 0
    call(*run(*[GOOD] * 3, record)).check_error(f"{tmp_path}/data.jsonl:4: {what} {NAMED}")


def test_another_tokenizer(files: Path, call: Call, tmp_path: Path) -> None:
    """The model's own knows no such token, and reads it as text."""
    data = {"objective": "sft", "train_data": str(write(tmp_path / "data.jsonl", IN_RESPONSE))}
    assert call(*dry_run(files, tmp_path, "plain", **data)).status == 0
    more = {"tokenizer": str(files / "model")}
    call(*dry_run(files, tmp_path, "plain", **data, **more)).check_error("data.jsonl:1", NAMED)


def test_stored_responses(files: Path, call: Call, tmp_path: Path) -> None:
    store = tmp_path / "run" / "teacher_responses"
    store.mkdir(parents=True)
    shard = store / "responses_00000000.jsonl"
    for token_id, status in ((511 - 4, 0), (512, 2)):
        write(
            shard, {"index": 0, "response_ids": [7, 510]}, {"index": 1, "response_ids": [token_id]}
        )
        outcome = call(*dry_run(files, tmp_path, objective="off_policy"))
        assert outcome.status == status, outcome.stderr
    outcome.check_error(f"{shard}:2: response_ids = 512: is no token of", "delete the file")


@pytest.mark.parametrize("script", [EVALUATE, GENERATE], ids=lambda path: path.stem)
def test_inference(files: Path, call: Call, tmp_path: Path, script: Path) -> None:
    data = write(tmp_path / "data.jsonl", GOOD, IN_PROMPT)
    flag = "--data" if script == EVALUATE else "--prompts"
    model = ("--load", files / "model", "--max-response-length", 8, "--device", "cpu")
    call(script, *model, flag, data).check_error(f"{data}:2: the prompt {NAMED}")
    if script == GENERATE:
        call(script, *model, "--prompt", NEW).check_error(f"--prompt:1: the prompt {NAMED}")


def test_corpus(files: Path, call: Call, tmp_path: Path) -> None:
    source = write(tmp_path / "corpus.jsonl", {"text": "1 + 1"}, {"text": f"1 {NEW}"})
    tool = (PREPROCESS, "--input", source, "--output-prefix", tmp_path / "corpus")
    outcome = call(*tool, "--tokenizer", files / "model")
    outcome.check_error(f'{source}:2: "text" {NAMED}')
    (files / "model" / "config.json").rename(tmp_path / "config.json")
    try:  # Without a model to compare with, ids are what the tokenizer says.
        assert call(*tool, "--tokenizer", files / "model").status == 0
    finally:
        (tmp_path / "config.json").rename(files / "model" / "config.json")


@pytest.mark.parametrize(
    ("model", "words"), [("model", f"1 tokens from '{NEW}' (id 512)"), ("plain", "")]
)
def test_a_conversion_says_which_tokens_are_of_no_use(
    files: Path, call: Call, tmp_path: Path, model: str, words: str
) -> None:
    arguments = (
        "--load",
        files / model,
        "--save",
        tmp_path / "out",
        "--target-format",
        "autoregressive",
    )
    outcome = call(CONVERT, *arguments, "--device", "cpu")
    assert outcome.status == 0
    assert (words in outcome.stderr) if words else outcome.stderr == ""
