"""`generate` and `evaluate` keep each response as it comes and go on after kill -9."""

import fcntl
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed_tests.spawn import start_ranks
from tests.faults.jobs import free_port
from tests.functional_tests.entry_points import (
    EVALUATE,
    GENERATE,
    Call,
    command_on_rank,
    run_ranks,
)
from tests.limits import largest_file
from tests.tiny import save_random_model, write_data

NUM_PROMPTS = 60
"""Enough to be killed in their midst; one after the other they take seconds."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    write_data(folder, NUM_PROMPTS)
    save_random_model(folder / "dense")
    return folder


def arguments(folder: Path, script: Path, output: Path) -> list[object]:
    data = ("--prompts", "prompts.jsonl") if script == GENERATE else ("--data", "examples.jsonl")
    decoding = ("--block-size", 4, "--temperature", 1, "--max-response-length", 8)
    where = ("--load", folder / "dense", data[0], folder / data[1], "--output", output)
    return [*where, *decoding, "--device", "cpu"]


def kept(output: Path) -> list[dict[str, Any]]:
    """Whole lines that are kept beside an output."""
    text = "".join(f.read_text() for f in Path(f"{output}.partial").glob("*.jsonl"))
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("}\n")]


def kill_amid(
    folder: Path, command: str, options: Sequence[object], output: Path, processes: int
) -> int:
    """Start a command's ranks, kill them; returns how many results they left.

    Args:
        folder: An empty one.
        command: `generate` or `evaluate`.
        options: Its arguments.
        output: Where it would write.
        processes: Number of ranks.
    """
    arguments = [command, *map(str, options), "--max-running-requests", "1"]
    ranks = start_ranks(command_on_rank, processes, folder, processes, free_port(), arguments)
    while len(kept(output)) < 8:
        assert all(process.is_alive() for _, process in ranks)
        time.sleep(0.01)
    for _, process in ranks:
        process.kill()
    for receiver, process in ranks:
        process.join()
        receiver.close()
    assert not output.exists()
    return len({entry["index"] for entry in kept(output)})


@pytest.fixture
def meeting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder beside that of the outputs."""
    return tmp_path_factory.mktemp("meeting")


def test_generate_on_two_processes_goes_on_in_one(
    folder: Path, meeting: Path, call: Call, tmp_path: Path
) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "output.jsonl"
    assert call(GENERATE, *arguments(folder, GENERATE, whole)).status == 0
    options = arguments(folder, GENERATE, output)
    left = kill_amid(meeting, "generate", options, output, processes=2)
    assert 8 <= left < NUM_PROMPTS
    # What a kill may leave at the end of a file.
    file = min(Path(f"{output}.partial").glob("*.jsonl"))
    with file.open("a") as opened:
        opened.write('{"setting": "dynamic_0.9", "ind')
    outcome = call(GENERATE, *options)
    assert outcome.status == 0, outcome.stderr
    assert f"| {left} responses are there already" in outcome.stderr
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output.jsonl", "whole.jsonl"]


def test_evaluate_in_one_process_goes_on_in_two(
    folder: Path, meeting: Path, call: Call, tmp_path: Path
) -> None:
    whole, output = tmp_path / "whole.json", tmp_path / "output.json"
    settings = ("--settings", "dynamic:0.2,static:2")
    assert call(EVALUATE, *arguments(folder, EVALUATE, whole), *settings).status == 0
    options = [*arguments(folder, EVALUATE, output), *settings]
    left = kill_amid(meeting, "evaluate", options, output, processes=1)
    before = max(entry["seconds"] for entry in kept(output))
    outcome = run_ranks(2, "evaluate", *options)
    assert outcome.status == 0, outcome.stderr
    assert f"dynamic_0.2 | {left} responses are there already" in outcome.stderr
    found, expected = (json.loads(file.read_text()) for file in (output, whole))
    assert found["settings"]["dynamic_0.2"]["seconds"] > before
    for summary in (found, expected):
        del summary["seconds"]
        for result in summary["settings"].values():
            del result["seconds"], result["tokens_per_second"]
    assert found == expected
    of_output, of_whole = (tmp_path / f"{n}.responses.jsonl" for n in ("output", "whole"))
    assert of_output.read_text() == of_whole.read_text()
    names = ["output.json", of_output.name, "whole.json", of_whole.name]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_another_command_does_not_go_on_with_it(folder: Path, call: Call, tmp_path: Path) -> None:
    output, first = tmp_path / "output.jsonl", tmp_path / "first.jsonl"
    first.write_text("".join((folder / "prompts.jsonl").read_text().splitlines(True)[:12]))
    options = [*arguments(folder, GENERATE, output), "--prompts", first]
    with largest_file(1500):
        outcome = call(GENERATE, *options, "--top-k", 5)
    outcome.check_error("--output = ", "output.jsonl.partial': cannot be written (File too large)")
    left = len(kept(output))
    assert 0 < left < 12
    other_model = save_random_model(tmp_path / "other", seed=1)
    for changed, words in (
        (("--top-k", 5, "--seed", 8), "seed = 1234, this one has 8"),
        (("--top-k", 5, "--num-responses", 2), "num_responses = 1, this one has 2"),
        (("--top-k", 6), "dynamic_0.9: top_k = 5, this one has 6"),
        (("--top-k", 5, "--max-response-length", 7), "max_response_length = 8, this one has 7"),
        (("--top-k", 5, "--prompts", folder / "prompts.jsonl"), "with data = "),
        (("--top-k", 5, "--load", other_model), "with model = "),
    ):
        outcome = call(GENERATE, *options, *changed)
        outcome.check_error("--output = ", f"{output}.partial holds results", words, "--restart")
    with Path(f"{output}.partial", "header.json").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as a command that runs now does
        for restart in ((), ("--restart",)):
            outcome = call(GENERATE, *options, "--top-k", 5, *restart)
            outcome.check_error(f"--output = '{output}': another command writes there now")
    assert len(kept(output)) == left
    assert call(GENERATE, *options, "--top-k", 6, "--restart").status == 0
    afresh = output.read_bytes()
    assert not Path(f"{output}.partial").exists()
    assert call(GENERATE, *options, "--top-k", 6).status == 0
    assert output.read_bytes() == afresh


def test_what_is_in_the_way_is_no_interrupted_command(
    folder: Path, call: Call, tmp_path: Path
) -> None:
    output = tmp_path / "output.jsonl"
    (tmp_path / "output.jsonl.partial").mkdir()
    (tmp_path / "output.jsonl.partial" / "mine.txt").write_text("mine")
    outcome = call(GENERATE, *arguments(folder, GENERATE, output))
    outcome.check_error("--output = ", "output.jsonl.partial is in the way")
    outcome = call(GENERATE, *arguments(folder, GENERATE, output), "--restart")
    outcome.check_error("--output = ", "output.jsonl.partial is in the way")
    assert (tmp_path / "output.jsonl.partial" / "mine.txt").read_text() == "mine"
