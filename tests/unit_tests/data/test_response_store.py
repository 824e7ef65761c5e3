"""Stored responses: read back as written, completed after an interruption, never for others."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_dlm.data.response_store import ResponseHeader, ResponseStore
from megatron_dlm.errors import UserError
from megatron_dlm.types.special_tokens import SpecialTokens

HEADER = ResponseHeader(
    prompts="a" * 64,
    prompt_tokens="b" * 64,
    num_prompts=8,
    teacher="teacher",
    teacher_weights="d" * 64,
    bf16=False,
    seed=1,
    eos_token_ids=[510],
    max_response_length=16,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
)
RESPONSES = [[index, 510] for index in range(8)]


def open_store(folder: Path, **changes: object) -> ResponseStore:
    special_tokens = SpecialTokens(510, 508, 511, vocab_size=512)
    header = dataclasses.replace(HEADER, **changes)
    return ResponseStore(folder, header, "--teacher-responses", special_tokens)


def stored(store: ResponseStore) -> list[list[int]]:
    table = store.read()
    return [table[index].tolist() for index in range(len(table))]


def test_what_is_written_is_read_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    store = open_store(tmp_path / "responses")
    store.create()
    assert store.missing(range(8)) == list(range(8))
    for shard in ([6, 7], [0, 2, 5], [1, 3, 4]):
        store.write(shard, [RESPONSES[index] for index in shard])
    assert store.missing(range(8)) == []
    assert stored(open_store(tmp_path / "responses")) == RESPONSES
    assert not list(tmp_path.glob("**/*.tmp"))


def test_what_exists_is_kept(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.create()
    store.write([3, 5], [RESPONSES[3], RESPONSES[5]])
    (tmp_path / "responses_00000000.jsonl.tmp").write_text('{"index": 0, "resp')  # cut off
    again = open_store(tmp_path)
    again.create()
    assert again.missing([0, 3, 4]) == [0, 4]
    assert again.missing([3, 5]) == []
    again.write([0, 4], [RESPONSES[0], RESPONSES[4]])
    assert stored(again) == [
        RESPONSES[index] if index in (0, 3, 4, 5) else [] for index in range(8)
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompts", "c" * 64),
        ("prompt_tokens", "c" * 64),
        ("num_prompts", 7),
        ("teacher_weights", "c" * 64),
        ("bf16", True),
        ("seed", 2),
        ("eos_token_ids", [508, 510]),
        ("max_response_length", 32),
        ("temperature", 0.5),
        ("top_k", 4),
        ("top_p", 0.9),
    ],
)
def test_responses_of_another_header_are_refused(tmp_path: Path, name: str, value: object) -> None:
    open_store(tmp_path).create()
    open_store(tmp_path)
    with pytest.raises(UserError, match=rf"--teacher-responses = .*{name} = .*another folder"):
        open_store(tmp_path, **{name: value})


def test_the_teacher_may_have_moved(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.create()
    store.write(range(8), RESPONSES)
    assert stored(open_store(tmp_path, teacher="elsewhere")) == RESPONSES


@pytest.mark.parametrize("text", ["{", "3"])
def test_a_damaged_header_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "header.json").write_text(text)
    with pytest.raises(UserError, match="another folder"):
        open_store(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"index": 1, "response_ids": [1]}\n',
        '{"index": "a", "response_ids": [1]}\n',
        '{"index": 0}\n',
        '{"index": 0, "response_ids": []}\n',
        '{"index": 0, "response_ids": [1]}\n{"index": 1, "response_ids": [1]}\n',
    ],
)
def test_a_damaged_shard_is_named(tmp_path: Path, text: str) -> None:
    store = open_store(tmp_path, num_prompts=1)
    store.create()
    (tmp_path / "responses_00000000.jsonl").write_text(text)
    for use in (store.read, lambda: store.missing([0])):
        with pytest.raises(UserError, match=r"responses_00000000\.jsonl.*is damaged; delete"):
            use()
    store.write(range(1), [[7]])
    assert json.loads((tmp_path / "responses_00000000.jsonl").read_text())["response_ids"] == [7]
    assert store.read()[0].tolist() == [7]


@pytest.mark.parametrize(
    ("token_id", "words"),
    [
        (512, "512: is no token of the model's vocabulary of 512"),
        (-1, "-1: is no token of the model's vocabulary of 512"),
        (511, "511: is the MASK token"),
    ],
)
def test_ids_that_no_model_can_read_are_named(tmp_path: Path, token_id: int, words: str) -> None:
    store = open_store(tmp_path)
    store.create()
    store.write([0, 1], [[3, 510], [4, token_id, 510]])
    for use in (store.read, lambda: store.missing(())):
        with pytest.raises(UserError) as error:
            use()
        place = tmp_path / "responses_00000000.jsonl"
        assert str(error.value).startswith(f"{place}:2: response_ids = {words}")
