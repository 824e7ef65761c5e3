"""Shipped mixtures of data have the published counts, and read the columns of their data sets."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatron_dlm.commands import main
from megatron_dlm.data.mixture import read_mixture
from tests.tiny import REPOSITORY, TOKENIZER

EXAMPLES = REPOSITORY / "examples"


def test_the_mixture_has_the_published_count_of_each_domain() -> None:
    counts: Counter[str | None] = Counter()
    for entry in read_mixture(EXAMPLES / "data" / "opdlm_62k.yaml", "--prompts").sources:
        counts[entry.domain] += entry.max_samples or 0
    assert counts == {"math": 20_222, "code": 21_594, "science": 10_000, "chat": 10_000}
    assert counts.total() == 61_816


ROWS: dict[str, list[dict[str, Any]]] = {
    "open-r1/DAPO-Math-17k-Processed en train": [
        {"prompt": "2 + 2?", "solution": "4", "data_source": "dapo", "ability": "MATH"}
    ],
    "BAAI/TACO/ALL/train-*.parquet": [
        {"question": "Add.", "solutions": "[]", "input_output": "{}"}
    ],
    "KodCode/KodCode-Light-RL-10K train": [{"question": "Sort.", "solution": "s", "test": "t"}],
    "TIGER-Lab/AceCode-87K train": [{"id": "1", "question": "Reverse.", "test_cases": ["a"]}],
    "divelab/opdlm_train_data/opdlm_train.json": [{"question": "Why?", "domain": "chat"}],
} | {
    f"nvidia/Nemotron-Post-Training-Dataset-v2 {split} ": [
        {
            "uuid": "1",
            "messages": [
                {"role": "system", "content": ""},
                {"role": "user", "content": f"A question of {split}"},
                {"role": "assistant", "content": "An answer."},
            ],
        }
    ]
    for split in ("math", "stem", "chat")
}
"""A row of each data set, in its columns."""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "opdlm_62k",
            [
                ("2 + 2?", "math"),
                ("A question of math", "math"),
                ("Add.", "code"),
                ("Sort.", "code"),
                ("Reverse.", "code"),
                ("A question of stem", "science"),
                ("A question of chat", "chat"),
            ],
        ),
        ("opdlm_published", [("Why?", "chat")]),
    ],
)
def test_published_data_is_prepared_as_prompts(
    name: str, expected: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data sets' own columns, as the hub would give them; it cannot be reached from a test."""

    def load(
        path: str,
        name: str | None = None,
        *,
        split: str,
        revision: str | None = None,
        data_files: str = "",
        streaming: bool = False,
    ) -> datasets.Dataset | datasets.IterableDataset:
        names = (f"{path} {name} {split}", f"{path} {split}", f"{path} {split} ")
        file = data_files.removeprefix("hf://datasets/")
        (rows,) = [ROWS[key] for key in (*names, file) if key in ROWS]
        table = datasets.Dataset.from_list(rows)
        return table.to_iterable_dataset() if streaming else table

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    out = tmp_path / "prompts.jsonl"
    arguments = ["--prompts", str(EXAMPLES / "data" / f"{name}.yaml"), "--output", str(out)]
    assert main(["data", "prepare", "--tokenizer", str(TOKENIZER), *arguments]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["messages"][-1]["content"], r["domain"]) for r in records] == expected
    assert not any("response" in record for record in records)
