"""`megatron-dlm data` finds what is wrong with each record, counts tokens, and writes the rest."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_dlm.commands import main
from megatron_dlm.data.survey import histogram, percentiles
from tests.tiny import TOKENIZER

GOOD = {"prompt": "Tom has 2 eggs.", "domain": "math"}
RECORDS: list[Any] = [
    GOOD,
    {"question": "What is 3 + 4?", "domain": "code"},
    {"prompt": ""},
    GOOD | {"id": 7},
    {"prompt": " \n"},
    {"prompt": "1" * 31},
    "no object",
    {"prompt": "5"},
]


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def run(action: str, *arguments: str) -> int:
    limit = ("--max-prompt-length", "30")
    return main(["data", action, "--tokenizer", str(TOKENIZER), *limit, *arguments])


def report(path: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, path.read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_check_lists_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path / "p.jsonl", RECORDS), tmp_path / "report.jsonl"
    assert run("check", "--prompts", path, "--report", str(out)) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        f'bad  {path}:3: "prompt" is empty; write the text or remove the line',
        f"bad  {path}:7: the line is a string, not an object; write one JSON object a line, with"
        ' "messages" or "prompt"',
        f"too_long  {path}:6: the prompt has 31 tokens, over 30",
        f"empty  {path}:5: the prompt has no text",
        f"duplicate  {path}:4: the same tokens as {path}:1",
        "8 records: 3 good, 2 that a run refuses, 1 over --max-prompt-length, 1 without text,"
        " 1 the same as an earlier one",
    ]
    assert [line["where"] for line in report(out, "bad")] == [f"{path}:3", f"{path}:7"]
    (summary,) = report(out, "summary")
    assert summary == {
        "kind": "summary",
        "data": path,
        "records": 8,
        "good": 3,
        "bad": 2,
        "too_long": 1,
        "empty": 1,
        "duplicate": 1,
    }
    assert run("check", "--prompts", path, "--max-shown", "1") == 1
    assert "bad  and 1 more, all in --report FILE" in capsys.readouterr().out
    assert run("check", "--prompts", write(tmp_path / "g.jsonl", [GOOD])) == 0


def test_stats_are_those_of_the_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["3", "3 + 4 = 7", "Tom has 2 eggs and buys 5 more."]
    records = [
        {"prompt": text, "response": text, "domain": "math" if i else "code"}
        for i, text in enumerate(texts)
    ]
    path, out = write(tmp_path / "t.jsonl", records), tmp_path / "report.jsonl"
    assert run("stats", "--train-data", path, "--report", str(out)) == 0
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    by_domain = {line["domain"]: line for line in report(out, "domain")}
    assert by_domain["all"]["prompt_tokens"]["total"] == sum(lengths)
    assert by_domain["code"]["prompt_tokens"]["max"] == lengths[0]
    assert by_domain["math"]["prompt_tokens"]["min"] == lengths[1]
    assert by_domain["all"]["response_tokens"]["total"] == sum(lengths) + 3, "with EOS"
    assert by_domain["math"]["responses"] == 2
    shown = capsys.readouterr().out
    assert "prompts in tokens" in shown
    assert "responses in tokens" in shown
    assert "3 records: 3 good" in shown


def test_prepare_writes_what_is_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "p.jsonl", RECORDS)
    mixture, out = tmp_path / "mixture.yaml", tmp_path / "out.jsonl"
    mixture.write_text("sources: [{path: p.jsonl}]")
    assert run("prepare", "--prompts", str(mixture), "--output", str(out)) == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        GOOD,
        {"messages": [{"role": "user", "content": "What is 3 + 4?"}], "domain": "code"},
        {"prompt": "5"},
    ]
    assert f"wrote {out}: 3 of 8 records" in capsys.readouterr().out
    before = out.read_text()
    bad = write(tmp_path / "bad.jsonl", [3])
    assert run("prepare", "--prompts", bad, "--output", str(out)) == 2
    assert out.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check"], "--prompts = None: is missing"),
        (["chek", "--prompts", "p"], "action = 'chek': is none; write megatron-dlm data check|"),
        (["--prompts", "p"], "action = None: is none"),
        (["stats", "--prompts", "p"], "--tokenizer = None: is missing"),
        (["check", "--prompts", "p", "--train-data", "q"], "comes with --train-data"),
        (["prepare", "--prompts", "p", "--tokenizer", "t"], "--output = None: is missing"),
        (["check", "--prompts", "p", "--max-prompt-length", "0"], "less than 1; choose 1 or more"),
        (
            ["stats", "--prompts", "p", "--tokenizer", "t", "--output", "o"],
            "--output = 'o': is not for data stats",
        ),
        (
            ["prepare", "--prompts", "p", "--tokenizer", "t", "--output", "p"],
            "--output = 'p': is --prompts",
        ),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", *arguments]) == 2
    assert words in capsys.readouterr().err


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=60))
def test_percentiles_and_histogram_count_the_lengths(lengths: list[int]) -> None:
    described = percentiles(lengths)
    assert (described["min"], described["max"]) == (min(lengths), max(lengths))
    for percent in (10, 50, 90, 99):
        value = described[f"p{percent}"]
        assert value in lengths
        assert 100 * sum(length <= value for length in lengths) >= percent * len(lengths)
        assert 100 * sum(length < value for length in lengths) < percent * len(lengths)
    for low, high, count in histogram(lengths):
        assert count == sum(low <= length <= high for length in lengths)
    assert sum(count for *_, count in histogram(lengths)) == len(lengths)
