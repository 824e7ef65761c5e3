"""The same records from every kind of file, and errors that name the place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from megatron_dlm.data.open_records import open_records
from megatron_dlm.data.prompts import read_prompts
from megatron_dlm.data.record_source import RecordSource
from megatron_dlm.types.special_tokens import SpecialTokens
from tests.refusal import refusal

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"{i} + 1?"}], "answer": str(i + 1), "id": i}
    for i in range(600)
]
"""More than are read at once."""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(folder: Path) -> str:
    table = datasets.Dataset.from_list(ROWS)
    for name, part in (("a", range(250)), ("b", range(250, 600))):
        table.select(part).to_parquet(str(folder / f"{name}.parquet"))
    return str(folder / "*.parquet")


def saved(folder: Path) -> str:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "saved"), num_shards=2)
    return str(folder / "saved")


def arrow(folder: Path) -> str:
    return saved(folder) + "/*.arrow"


def splits(folder: Path) -> str:
    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"test": table.select([0]), "train": table}).save_to_disk(
        str(folder / "splits")
    )
    return str(folder / "splits")


def jsonl(folder: Path) -> str:
    write_jsonl(folder / "0.jsonl", ROWS[:1])
    write_jsonl(folder / "1.jsonl", ROWS[1:])
    return str(folder / "?.jsonl")


@pytest.mark.parametrize("write", [parquet, saved, arrow, splits, jsonl])
def test_all_formats_have_the_same_records(write: Callable[[Path], str], tmp_path: Path) -> None:
    path = write(tmp_path)
    records = open_records(path, "--prompts")
    assert [record for _, record in records.records()] == ROWS
    for index in np.random.default_rng(0).integers(0, 600, 40).tolist():
        assert records.record(index) == ROWS[index]
    if write is not jsonl:  # of the rows, whatever the file
        expected = open_records(saved(tmp_path), "--prompts").fingerprint
        assert records.fingerprint == expected
    if write is parquet:
        assert records.where(250) == f"{tmp_path / 'b.parquet'}: row 0"
        assert records.where(249) == f"{tmp_path / 'a.parquet'}: row 249"


def test_prompts_of_a_table_have_the_tokens_of_jsonl(
    tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens, tmp_path: Path
) -> None:
    """A table has null where JSONL has no field."""
    rows: list[dict[str, Any]] = [
        {"prompt": "Tom has 2 eggs.", "answer": "2"},
        {"messages": [{"role": "user", "content": "Ann"}]},
        {"messages": [{"role": "system", "content": "7"}, {"role": "user", "content": "Ann"}]},
    ]
    names = ("prompt", "messages", "answer")
    whole = [{name: row.get(name) for name in names} for row in [*rows, {"prompt": ""}]]
    datasets.Dataset.from_list(whole[:3]).to_parquet(str(tmp_path / "p.parquet"))
    files = [tmp_path / "p.parquet", write_jsonl(tmp_path / "p.jsonl", rows)]
    table, lines = (read_prompts(file, tokenizer, special_tokens, 100) for file in files)
    assert table.fingerprint() == lines.fingerprint()
    datasets.Dataset.from_list(whole).to_parquet(str(tmp_path / "q.parquet"))
    error = refusal(read_prompts, tmp_path / "q.parquet", tokenizer, special_tokens, 100)
    assert error == (
        f'{tmp_path / "q.parquet"}: row 3: "prompt" is empty; write the text or remove the line'
    )


def test_what_json_lacks_is_text_or_left_out(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict(
        {"prompt": ["a"], "image": [b"\x00"], "score": [float("nan")], "n": [None]}
    )
    table.to_parquet(str(tmp_path / "p.parquet"))
    record = open_records(tmp_path / "p.parquet", "--prompts").record(0)
    assert record == {"prompt": "a", "image": None, "score": None}


USER = {"role": "user", "content": "2 + 2?"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": [USER], "ability": "math"}, {"messages": [USER], "ability": "math"}),
        (
            {"question": "2 + 2?", "answer": "4", "domain": "math"},
            {"messages": [USER], "response": "4", "answer": "4", "domain": "math"},
        ),
        ({"question": "2 + 2?", "answer": 4}, {"messages": [USER], "answer": 4}),
        (
            {"instruction": "Add.", "input": "2 2", "output": "4"},
            {"messages": [{"role": "user", "content": "Add.\n\n2 2"}], "response": "4"},
        ),
        (
            {"instruction": "2 + 2?", "input": "", "output": "4"},
            {"messages": [USER], "response": "4"},
        ),
        (
            {
                "system": "Be brief.",
                "conversations": [
                    {"from": "human", "value": "2 + 2?"},
                    {"from": "gpt", "value": "4"},
                ],
            },
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    USER,
                    {"role": "assistant", "content": "4"},
                ]
            },
        ),
        ({"conversations": [USER]}, {"messages": [USER]}),
        ({"messages": None, "prompt": None, "conversations": [USER]}, {"messages": [USER]}),
        ({"prompt": "a", "messages": None}, {"prompt": "a"}),
        (
            {
                "instruction": "2 + 2?",
                "input": None,
                "output": None,
                "system": "Be brief.",
                "history": [["1 + 1?", "2"]],
            },
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "1 + 1?"},
                    {"role": "assistant", "content": "2"},
                    USER,
                ]
            },
        ),
        ({"messages": [USER], "question": "?"}, {"messages": [USER], "question": "?"}),
        ({"prompt": "a", "instruction": "b"}, {"prompt": "a", "instruction": "b"}),
        ({"text": "a"}, {"text": "a"}),
    ],
)
def test_formats_are_recognised(
    record: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    records = open_records(write_jsonl(tmp_path / "p.jsonl", [record]), "--prompts")
    assert records.record(0) == expected


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"question": 3}, '"question" is a number, not a string'),
        ({"instruction": "a", "input": [1]}, '"input" is a list, not a string'),
        ({"instruction": "a", "input": 0}, '"input" is a number, not a string'),
        ({"instruction": "a", "system": 7}, '"system" is a number, not a string'),
        ({"instruction": "a", "history": [["b"]]}, '"history" has something else than pairs'),
        ({"instruction": "a", "history": "b"}, '"history" has something else than pairs'),
        ({"conversations": [USER], "system": [1]}, '"system" is a list, not a string'),
        ({"conversations": "a"}, '"conversations" is a string, not a list'),
        ({"conversations": [{"from": [], "value": "a"}]}, 'conversations[0]["from"] = []: is no'),
        ({"conversations": ["a"]}, "conversations[0] is a string, not an object"),
        (
            {"conversations": [{"from": "robot", "value": "a"}]},
            "conversations[0][\"from\"] = 'robot': is no known speaker; use human, user, gpt",
        ),
    ],
)
def test_a_malformed_format_is_named(record: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, record])
    error = str(refusal(open_records(path, "--prompts").record, 1))
    assert error.startswith(f"{path}:2: {words}")


def test_what_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(path: Path | str) -> str:
        return str(refusal(open_records, path, "--prompts"))

    (tmp_path / "bad.parquet").write_text("no table")
    write_jsonl(tmp_path / "p.jsonl", ROWS[:1])
    datasets.Dataset.from_dict({"prompt": []}).to_parquet(str(tmp_path / "none.parquet"))
    found = error(tmp_path / "bad.parquet")
    assert found.startswith(f"--prompts = '{tmp_path / 'bad.parquet'}': cannot be loaded (Arrow")
    assert "no such file" in error(tmp_path / "missing.parquet")
    assert "is a directory" in error(tmp_path)
    assert "has no row; name another" in error(tmp_path / "none.parquet")
    assert "different formats" in error(tmp_path / "*[dl]*")
    assert "matches no file" in error(tmp_path / "*.csv")
    assert "(file name too long)" in error(tmp_path / ("p" * 5000))
    assert "(file name too long)" in error(tmp_path / ("p" * 5000 + ".parquet"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "install it with pip install 'megatron-dlm[data]'" in error(tmp_path / "bad.parquet")


def test_the_hub_is_asked_for_what_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub can be reached: its answer is a data set in memory, its refusal an exception."""
    asked = []

    def load(*names: Any, **options: Any) -> datasets.Dataset:
        asked.append((names, options))
        if names[0] == "no/such":
            raise datasets.exceptions.DatasetNotFoundError("no/such does not exist\non the Hub")
        return datasets.Dataset.from_list(ROWS[:3])

    monkeypatch.setattr(datasets, "load_dataset", load)
    records: RecordSource = open_records("hf://datasets/owner/name@abc", "--prompts")
    assert records.record(2) == ROWS[2]
    assert records.where(2) == "hf://datasets/owner/name: row 2"
    assert asked.pop() == (("owner/name", None), {"split": "train", "revision": "abc"})
    url = "hf://datasets/owner/name@abc/data/*.json"
    assert open_records(url, "--prompts").where(0) == f"{url}: row 0"
    assert asked.pop() == (("json",), {"data_files": url, "split": "train"})
    assert "name .parquet" in str(refusal(open_records, url + "x", "--prompts"))
    error = refusal(open_records, "hf://datasets/no/such", "--prompts")
    assert error == (
        "--prompts = 'no/such': cannot be loaded (DatasetNotFoundError: no/such does not exist);"
        " check its name and format"
    )
