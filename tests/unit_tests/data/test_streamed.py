"""A sample that is streamed: records of the data set, the same ones whenever it is opened again."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from megatron_dlm.data import streamed
from megatron_dlm.data.open_records import open_records
from megatron_dlm.data.record_source import Record
from tests.refusal import refusal

ROWS = [{"question": f"{i}?", "answer": str(i), "note": None} for i in range(40)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a data set as the hub has it, in two files, which also are files by path."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(streamed, "BUFFER", 8)
    monkeypatch.chdir(tmp_path)  # datasets take owner/name for a folder where there is one
    data = tmp_path / "owner" / "name"
    data.mkdir(parents=True)
    table = datasets.Dataset.from_list(
        ROWS, features=datasets.Features({name: datasets.Value("string") for name in ROWS[0]})
    )
    for name, part in (("train-0", range(25)), ("train-1", range(25, 40))):
        table.select(part).to_parquet(str(data / f"{name}.parquet"))
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "lines.jsonl").write_text(lines)
    return tmp_path


def read(folder: Path, *sources: dict[str, Any], seed: int = 1) -> list[Record]:
    mixture = folder / "mixture.yaml"
    mixture.write_text(yaml.safe_dump({"seed": seed, "sources": list(sources)}))
    return [record for _, record in open_records(mixture, "--prompts").records()]


def test_a_sample_of_a_stream(folder: Path) -> None:
    entry = {"path": "*.jsonl", "streaming": True, "max_samples": 12}
    entry |= {"fields": {"prompt": "question"}}
    records = read(folder, entry)
    asked = [record["prompt"] for record in records]
    assert len(set(asked)) == 12
    assert set(asked) <= {row["question"] for row in ROWS}
    assert asked != [row["question"] for row in ROWS[:12]]  # shuffled
    assert {tuple(record) for record in records} == {("prompt",)}
    assert read(folder, entry, seed=2) != records
    assert read(folder, entry, entry)[12:] != records  # a source's place counts
    (folder / "lines.jsonl").unlink()
    assert read(folder, entry) == records


def test_a_data_set_of_the_hub_that_is_shorter_than_asked(folder: Path) -> None:
    entry = {"hub": "owner/name", "streaming": True, "max_samples": 1000}
    records = read(folder, entry | {"weight": 1.5})
    assert len(records) == 60
    plain = [{"messages": [{"role": "user", "content": row["question"]}]} for row in ROWS]
    assert {record["messages"][0]["content"] for record in records} == {
        record["messages"][0]["content"] for record in plain
    }
    assert not any("note" in record for record in records)  # null
    opened = open_records(folder / "mixture.yaml", "--prompts")
    assert opened.where(0) == "hf://datasets/owner/name: streamed record 0"


def test_the_hub_is_asked_for_a_stream(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(**options: Any) -> datasets.IterableDataset:
        asked.append(options)
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    hub = {"hub": "a/b", "subset": "all", "split": "test", "revision": "0a1"}
    read(folder, hub | {"streaming": True, "max_samples": 3})
    url = "hf://datasets/a/b/data/*.jsonl"
    read(folder, {"path": url, "streaming": True, "max_samples": 3})
    assert asked == [
        {"path": "a/b", "name": "all", "split": "test", "revision": "0a1", "streaming": True},
        {"path": "json", "data_files": url, "split": "train", "streaming": True},
    ]


def test_what_cannot_be_streamed_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(**source: Any) -> str:
        return str(refusal(read, folder, source | {"streaming": True}))

    assert "is streaming without max_samples, the records to take" in error(hub="owner/name")
    few = {"max_samples": 3}
    assert "name .parquet, .arrow, .json, .jsonl" in error(path="a.csv", **few)
    assert "files have no splits" in error(path="lines.jsonl", split="test", **few)
    wanted = {"prompt": "text"}
    assert "'text'" in error(hub="owner/name", fields=wanted, **few)
    assert "sources[0].path = " in error(path="missing.jsonl", **few)
    assert "cannot be loaded (FileNotFoundError" in error(path="missing.jsonl", **few)

    def unreachable(**options: Any) -> None:
        raise ConnectionError("Couldn't reach 'a/b' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert error(hub="a/b", **few) == (
        f"{folder}/mixture.yaml: sources[0].hub = 'hf://datasets/a/b': cannot be loaded"
        " (ConnectionError: Couldn't reach 'a/b' on the Hub); check the network (and HF_ENDPOINT,"
        " HF_HUB_OFFLINE), or name a local copy"
    )
    assert not list(folder.glob("cache/**/*.jsonl"))
