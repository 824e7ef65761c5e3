"""tools/preprocess_data.py writes the ids of the tokenizer, and refuses bad input."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from datasets import Dataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from tests.functional_tests.entry_points import PREPROCESS, PRETRAIN, Call, run_process
from tests.tiny import TOKENIZER, save_random_model

TEXTS = ["Tom has 2 cards.", "", "3 + 4 = 7\n#### 7", "How many nuts?"] * 40
EOS = 510


def write(path: Path, texts: Sequence[str], key: str = "text") -> Path:
    path.write_text("\n".join(json.dumps({key: text, "id": 1}) + "\n" for text in texts))
    return path


def documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


def expected(texts: Sequence[str], end: list[int]) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    return [tokenizer(t, add_special_tokens=False)["input_ids"] + end for t in texts if t]


def arguments(source: Path, prefix: Path, *more: object) -> list[object]:
    return ["--input", source, "--tokenizer", TOKENIZER, "--output-prefix", prefix, *more]


def test_documents_are_those_of_the_tokenizer(tmp_path: Path, call: Call) -> None:
    source = write(tmp_path / "c.jsonl", TEXTS)
    outcome = call(PREPROCESS, *arguments(source, tmp_path / "new" / "with"))
    assert outcome.status == 0
    assert "160 documents (40 empty ones left out)" in outcome.stdout
    assert documents(tmp_path / "new" / "with") == expected(TEXTS, [EOS])
    call(PREPROCESS, *arguments(source, tmp_path / "without", "--no-append-eod"))
    assert documents(tmp_path / "without") == expected(TEXTS, [])


def test_documents_of_a_table(tmp_path: Path, call: Call) -> None:
    Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    outcome = call(PREPROCESS, *arguments(tmp_path / "saved", tmp_path / "c"))
    assert "160 documents (40 empty ones left out)" in outcome.stdout
    assert documents(tmp_path / "c") == expected(TEXTS, [EOS])
    Dataset.from_dict({"text": ["a"], "n": [1]}).save_to_disk(str(tmp_path / "bad"))
    more = ("--json-keys", "n")
    outcome = call(PREPROCESS, *arguments(tmp_path / "bad", tmp_path / "d", *more))
    outcome.check_error(f"{tmp_path / 'bad'}: row 0", '"n" is not a string')


def test_workers_change_nothing_and_each_key_is_a_dataset(tmp_path: Path, call: Call) -> None:
    lines = [{"a": text, "b": text[::-1]} for text in TEXTS]
    source = tmp_path / "c.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    more = ("--json-keys", "a,b", "--workers", 2)
    outcome = run_process(PREPROCESS, *arguments(source, tmp_path / "both", *more))
    assert outcome.status == 0, outcome.stderr
    assert documents(tmp_path / "both_a") == expected(TEXTS, [EOS])
    assert documents(tmp_path / "both_b") == expected([text[::-1] for text in TEXTS], [EOS])
    source.write_text(json.dumps(lines[0]) + '\n{"a": 1}\n')
    outcome = run_process(PREPROCESS, *arguments(source, tmp_path / "bad", *more))
    outcome.check_error(f"{source}:2", '"a" is not a string')


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": ', "broken JSON"),
        ("[1]", "not an object"),
        ('{"txt": "x"}', '"text" is missing'),
        ('{"text": 3}', '"text" is not a string'),
        ('{"text": "a <|MASK|> b"}', "MASK token (id 511)"),
    ],
)
def test_a_bad_line_is_named_and_leaves_no_file(
    tmp_path: Path, call: Call, line: str, problem: str
) -> None:
    source = tmp_path / "c.jsonl"
    source.write_text('{"text": "good"}\n\n' + line + "\n")
    outcome = call(PREPROCESS, *arguments(source, tmp_path / "out"))
    outcome.check_error(f"{source}:3", problem)
    assert list(tmp_path.iterdir()) == [source]


def test_arguments_that_cannot_work(tmp_path: Path, call: Call) -> None:
    source = write(tmp_path / "c.jsonl", ["x"])
    out = tmp_path / "out"
    call(PREPROCESS).check_error("--input = None")
    call(PREPROCESS, "--input", source).check_error("--tokenizer = None")
    call(PREPROCESS, *arguments(source, out)[:4]).check_error("--output-prefix = None")
    call(PREPROCESS, *arguments(source, out, "--workers", 0)).check_error("--workers = 0")
    call(PREPROCESS, *arguments(source, out, "--json-keys", "a,a")).check_error("--json-keys")
    call(PREPROCESS, *arguments(tmp_path / "no.jsonl", out)).check_error("no.jsonl", "no such file")
    empty = write(tmp_path / "empty.jsonl", ["", ""])
    call(PREPROCESS, *arguments(empty, out)).check_error("--input", "holds no text")
    assert call(PREPROCESS, *arguments(source, out)).status == 0
    call(PREPROCESS, *arguments(source, out)).check_error("--output-prefix", "already exists")


def test_bad_corpora_end_a_run_before_it_starts(tmp_path: Path, call: Call) -> None:
    model = save_random_model(tmp_path / "model")
    common = ("--objective", "scp", "--load", model, "--train-iters", 2, "--device", "cpu")
    common = (*common, "--seq-length", 16, "--global-batch-size", 2)
    nowhere = tmp_path / "nowhere"
    call(PRETRAIN, *common, "--data-path", nowhere).check_error("--data-path", "there is no")
    source = write(tmp_path / "c.jsonl", TEXTS)
    call(PREPROCESS, *arguments(source, tmp_path / "c"))
    held_out = ("--data-path", tmp_path / "c", "--valid-data-path", nowhere)
    call(PRETRAIN, *common, *held_out).check_error("--valid-data-path", "there is no")
    small = save_random_model(tmp_path / "small", vocab_size=384, eos_token_id=3, pad_token_id=4)
    wrong = ("--load", small, "--tokenizer", small, "--data-path", tmp_path / "c", "--dry-run")
    assert call(PRETRAIN, *common, *wrong).status == 2
