"""Stored responses: read back as written, completed after an interruption, never for others."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_dlm.data.response_store import ResponseHeader, ResponseStore
from megatron_dlm.errors import UserError

HEADER = ResponseHeader(
    prompts="a" * 64,
    prompt_tokens="b" * 64,
    num_prompts=8,
    teacher="teacher",
    teacher_weights="d" * 64,
    bf16=False,
    seed=1,
    max_response_length=16,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
)
RESPONSES = [[index, 510] for index in range(8)]


def open_store(folder: Path, **changes: object) -> ResponseStore:
    return ResponseStore(folder, dataclasses.replace(HEADER, **changes), "--teacher-responses")


def test_what_is_written_is_read_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    store = open_store(tmp_path / "responses")
    store.create(3)
    assert store.missing() == [range(3), range(3, 6), range(6, 8)]
    for shard in reversed(store.missing()):
        store.write(shard, [RESPONSES[index] for index in shard])
    assert store.missing() == []
    table = open_store(tmp_path / "responses").read()
    assert [table[index].tolist() for index in range(len(table))] == RESPONSES
    assert not list(tmp_path.glob("**/*.tmp"))


def test_what_exists_is_kept(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.create(3)
    store.write(range(3, 6), RESPONSES[3:6])
    (tmp_path / "responses_00000000.jsonl.tmp").write_text('{"index": 0, "resp')  # cut off
    again = open_store(tmp_path)
    again.create(5)  # another run's wish: shards stay as they are
    assert again.missing() == [range(3), range(6, 8)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompts", "c" * 64),
        ("prompt_tokens", "c" * 64),
        ("num_prompts", 7),
        ("teacher_weights", "c" * 64),
        ("bf16", True),
        ("seed", 2),
        ("max_response_length", 32),
        ("temperature", 0.5),
        ("top_k", 4),
        ("top_p", 0.9),
    ],
)
def test_responses_of_another_header_are_refused(tmp_path: Path, name: str, value: object) -> None:
    open_store(tmp_path).create(3)
    open_store(tmp_path)
    with pytest.raises(UserError, match=rf"--teacher-responses = .*{name} = .*another folder"):
        open_store(tmp_path, **{name: value})


def test_the_teacher_may_have_moved(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.create(8)
    store.write(range(8), RESPONSES)
    assert open_store(tmp_path, teacher="elsewhere").missing() == []


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "header.json").write_text("{")
    with pytest.raises(UserError, match="another folder"):
        open_store(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", '{"index": 1, "response_ids": [1]}\n', '{"index": 0}\n', None]
)
def test_a_damaged_shard_is_named(tmp_path: Path, text: str | None) -> None:
    store = open_store(tmp_path, num_prompts=1)
    store.create(1)
    if text is not None:
        (tmp_path / "responses_00000000.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"responses_00000000\.jsonl.*is damaged; delete"):
        store.read()
    store.write(range(1), [[7]])
    assert json.loads((tmp_path / "responses_00000000.jsonl").read_text())["response_ids"] == [7]
    assert store.read()[0].tolist() == [7]
