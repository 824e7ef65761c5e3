"""Commands whose output cannot be written, or would replace what they read; nothing is lost."""

import io
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from megatron_dlm.commands import conversion
from megatron_dlm.evaluation import generation
from tests.functional_tests.entry_points import (
    CONVERT,
    CRITICAL_BATCH_SIZE,
    EVALUATE,
    GENERATE,
    PREPROCESS,
    PRETRAIN,
    Call,
    options,
    run_process,
)
from tests.limits import largest_file
from tests.tiny import TOKENIZER

COMMON = ("--max-response-length", 8, "--device", "cpu")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building a model is the long work that no error may come after."""

    def build(*_: object) -> None:
        raise AssertionError("a model is built")

    monkeypatch.setattr(generation, "build_frozen_model", build)
    monkeypatch.setattr(conversion, "build_model", build)


def answering(script: Path, files: Path, output: Path) -> list[object]:
    data = "--prompts" if script == GENERATE else "--data"
    return ["--load", files / "dense", data, files / "prompts.jsonl", "--output", output, *COMMON]


@pytest.mark.parametrize("script", [GENERATE, EVALUATE], ids=["generate", "evaluate"])
def test_answers_do_not_replace_what_is_read(
    files: Path, call: Call, tmp_path: Path, no_model: None, script: Path
) -> None:
    copy = Path(shutil.copytree(files, tmp_path / "files"))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    (tmp_path / "link").symlink_to(copy / "prompts.jsonl")
    (tmp_path / "hard").hardlink_to(copy / "dense" / "model.safetensors")
    data = "--prompts" if script == GENERATE else "--data"
    for output, words in (
        (copy / "prompts.jsonl", f"is the input {data} = "),
        (copy / "dense" / ".." / "prompts.jsonl", f"is the input {data} = "),
        (tmp_path / "link", f"is the input {data} = "),
        (tmp_path / "hard", "is the input --load = "),
        (copy / "dense" / "config.json", "is the input --load = "),
        (copy / "dense" / "tokenizer.json", "is the input --tokenizer = "),
        (copy / "dense", "is a folder"),
        (copy / "prompts.jsonl" / "results", "(Not a directory)"),
        (Path("/proc/results"), "cannot be written"),
    ):
        outcome = call(script, *answering(script, copy, output))
        outcome.check_error(f"--output = '{output}': ", words)
    assert before == {path: path.read_bytes() for path in before}
    call(script, *answering(script, copy, copy)[:-6], *COMMON, "--restart").check_error(
        "--restart = True", "without --output"
    )


def test_conversion_does_not_replace_what_it_reads(
    files: Path, call: Call, tmp_path: Path, no_model: None
) -> None:
    model = Path(shutil.copytree(files / "dense", tmp_path / "models" / "dense"))
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "file").write_text("old")
    (tmp_path / "run" / "iter_0000001").mkdir(parents=True)
    convert = ("--load", model, "--target-format", "autoregressive", "--overwrite")
    for target, words in (
        (model, "holds the input --load = "),
        (model.parent, "holds the input --load = "),
        (tmp_path / "link", "holds the input --load = "),
        (tmp_path / "file", "is no folder"),
        (tmp_path / "run", "holds no Hugging Face model, which --overwrite replaces"),
        (tmp_path / "file" / "hf", "(Not a directory)"),
        (Path("/proc/hf"), "cannot be written"),
    ):
        call(CONVERT, *convert, "--save", target).check_error(f"--save = '{target}': ", words)
    assert (model / "config.json").is_file()
    assert (tmp_path / "run" / "iter_0000001").is_dir()
    assert (tmp_path / "file").read_text() == "old"


def test_a_run_does_not_go_into_a_model(files: Path, call: Call) -> None:
    before = sorted((files / "dense").iterdir())
    outcome = call(PRETRAIN, *options(files, save=files / "dense"))
    outcome.check_error("--save = ", "is a Hugging Face model")
    assert sorted((files / "dense").iterdir()) == before


def test_a_refused_write_destroys_nothing(files: Path, call: Call, tmp_path: Path) -> None:
    """Each command is refused in the midst of its own writes; then nothing is in its way."""
    refused = "cannot be written (File too large); make room there"
    responses, results = tmp_path / "responses.jsonl", tmp_path / "results.json"
    for script, output, size in ((GENERATE, responses, 1500), (EVALUATE, results, 100)):
        output.write_text("old")
        with largest_file(size):
            call(script, *answering(script, files, output)).check_error("--output = ", refused)
        assert output.read_text() == "old"
        assert call(script, *answering(script, files, output)).status == 0
    assert len(responses.read_text().splitlines()) == 8
    assert json.loads(results.read_text())["num_examples"] == 8

    save = tmp_path / "hf"
    convert = ("--load", files / "dense", "--save", save, "--target-format", "autoregressive")
    assert call(CONVERT, *convert).status == 0
    before = {path: path.read_bytes() for path in save.iterdir()}
    with largest_file(20_000):
        outcome = call(CONVERT, *convert, "--overwrite", "--dtype", "bfloat16")
        outcome.check_error("--save = ", refused)
    assert before == {path: path.read_bytes() for path in save.iterdir()}
    assert call(CONVERT, *convert, "--overwrite", "--dtype", "bfloat16").status == 0

    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": "one and two " * 99}) + "\n" for _ in range(99)))
    preprocess = ("--input", corpus, "--tokenizer", TOKENIZER, "--output-prefix", tmp_path / "c")
    with largest_file(20_000):
        call(PREPROCESS, *preprocess).check_error("--output-prefix = ", refused)
    assert call(PREPROCESS, *preprocess).status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("c.bin", "c.idx", "corpus.jsonl", "hf", "responses.jsonl", "results.json"),
        "results.responses.jsonl",
    ]


def test_other_places_are_said_before_long_work(call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    below = tmp_path / "file" / "below"
    corpus = ("--input", tmp_path / "file", "--tokenizer", TOKENIZER)
    call(PREPROCESS, *corpus, "--output-prefix", below).check_error(
        "--output-prefix = ", "(Not a directory)"
    )
    study = ("--training-config", "examples/tiny/scp.yaml", "--save", below)
    sizes = ("--batch-sizes", "8,16", "--token-budget", 2**20, "--load", TOKENIZER)
    call(CRITICAL_BATCH_SIZE, *study, *sizes).check_error("--save = ", "(Not a directory)")


def test_results_outlive_the_lines_about_them(files: Path, tmp_path: Path) -> None:
    """`evaluate ... | head`, whose reader has left, on an ASCII terminal, beside a written file."""
    reader, writer = os.pipe()
    os.close(reader)
    results = tmp_path / "größe.json"
    outcome = run_process(
        EVALUATE,
        *answering(EVALUATE, files, results),
        stdout=writer,
        LC_ALL="C",
        PYTHONUTF8="0",
        PYTHONIOENCODING="ascii",
    )
    os.close(writer)
    assert (outcome.status, outcome.stderr) == (0, "")
    assert json.loads(results.read_text())["num_examples"] == 8


def test_responses_that_standard_output_cannot_take(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"prompt": "größer \U0001f600"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(record) + "\n")
    generate = ("--load", files / "dense", "--prompts", tmp_path / "prompts.jsonl", *COMMON)
    monkeypatch.setattr(sys, "argv", [str(GENERATE), *map(str, generate)])
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(GENERATE), run_name="__main__")
    line = shown.buffer.getvalue()  # type: ignore[attr-defined]
    assert line.isascii()
    assert json.loads(line)["prompt"] == record["prompt"]
    with Path("/dev/full").open("w") as full:
        outcome = run_process(GENERATE, *generate, stdout=full)
    outcome.check_error("standard output", "(No space left on device)")
