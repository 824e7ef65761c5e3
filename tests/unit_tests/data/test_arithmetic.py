"""The generated problems are right, stay in range and never cross the split."""

import json
import re
from itertools import islice
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.data.arithmetic import (
    HELDOUT_ONE_IN,
    MAX_ADDEND,
    MAX_FACTOR,
    MAX_START,
    MAX_VALUE,
    SPLITS,
    Operation,
    Problem,
    Split,
    Symbol,
    examples,
    generate_example,
    main,
)

STEP = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")
EXAMPLE_NUMBERS = st.tuples(
    st.sampled_from(SPLITS), st.integers(0, 2**31), st.integers(0, 10_000_000)
)


def parse_response(response: str) -> tuple[Problem, str]:
    """Read a response back, computing every step independently of the generator."""
    *lines, last = response.split("\n")
    operations: list[Operation] = []
    running: int | None = None
    for line in lines:
        match = STEP.fullmatch(line)
        assert match, line
        before, symbol, operand, after = match.groups()
        assert running is None or int(before) == running, "a step starts where the last one ended"
        assert eval(f"{before} {symbol} {operand}") == int(after), line
        running = int(after)
        operations.append(Operation(cast(Symbol, symbol), int(operand)))
    assert last == f"#### {running}"
    start = int(lines[0].split()[0])
    return Problem(start, tuple(operations)), last[5:]


@settings(deadline=None)
@given(EXAMPLE_NUMBERS)
def test_response_is_right_and_has_two_steps(numbers: tuple[Split, int, int]) -> None:
    example = generate_example(*numbers)
    problem, answer = parse_response(example["response"])
    assert answer == example["answer"]
    assert len(problem.operations) in (2, 3)
    assert 2 <= problem.start <= MAX_START
    assert all(0 <= value <= MAX_VALUE for value in problem.values)
    for operation in problem.operations:
        low, high = (2, MAX_FACTOR) if operation.symbol == "*" else (1, MAX_ADDEND)
        assert low <= operation.operand <= high


@settings(deadline=None)
@given(EXAMPLE_NUMBERS)
def test_example_belongs_to_its_split(numbers: tuple[Split, int, int]) -> None:
    problem, _ = parse_response(generate_example(*numbers)["response"])
    assert problem.split == numbers[0]


def test_splits_share_no_arithmetic() -> None:
    contents = {
        split: {parse_response(e["response"])[0].key for e in islice(examples(split, 7), 4000)}
        for split in SPLITS
    }
    assert len(contents["heldout"]) > 2000
    assert contents["train"].isdisjoint(contents["heldout"])


def test_split_is_fixed_by_content() -> None:
    """Golden values: another hash would move problems that a committed model was trained on."""
    keys = {
        (start, symbol): Problem(start, (Operation("+", 5), Operation(symbol, 2))).split
        for start in range(2, 41)
        for symbol in ("+", "-", "*")
    }
    held_out = [f"{start}+5{symbol}2" for (start, symbol), s in keys.items() if s == "heldout"]
    assert held_out == HELDOUT_GOLDEN
    assert HELDOUT_ONE_IN == 10


HELDOUT_GOLDEN = [
    "8+5-2",
    "13+5-2",
    "14+5+2",
    "16+5*2",
    "18+5-2",
    "19+5+2",
    "20+5-2",
    "26+5*2",
    "27+5*2",
    "28+5-2",
    "39+5-2",
    "40+5-2",
]


def test_wording_tells_the_numbers_in_order() -> None:
    for example in islice(examples("train", 3), 500):
        problem, _ = parse_response(example["response"])
        content = example["messages"][0]["content"]
        told = re.findall(r"\d+|doubles|triples", content)
        numbers = [{"doubles": 2, "triples": 3}.get(word) or int(word) for word in told]
        assert numbers == [problem.start, *(o.operand for o in problem.operations)]
        assert "{" not in content
        assert content.endswith("?")


def test_example_does_not_depend_on_the_ones_before() -> None:
    sequence = list(islice(examples("train", 5), 20))
    assert generate_example("train", 5, 13) == sequence[13]
    assert list(islice(examples("train", 5, start=10), 10)) == sequence[10:]
    assert sequence != list(islice(examples("train", 6), 20))


def test_examples_are_the_same_on_every_machine() -> None:
    assert generate_example("train", 1, 0) == GOLDEN_EXAMPLE


GOLDEN_EXAMPLE = {
    "messages": [
        {
            "role": "user",
            "content": "Max starts a game with 28 points. He loses 9. He gives up 6."
            " How many points does Max have now?",
        }
    ],
    "response": "28 - 9 = 19\n19 - 6 = 13\n#### 13",
    "answer": "13",
}


def test_command_writes_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.jsonl"
    arguments = ["--split", "heldout", "--num", "7", "--seed", "2", "--output", str(path)]
    assert main(arguments) == 0
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records == list(islice(examples("heldout", 2), 7))


def test_command_refuses_zero_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--split", "train", "--num", "0", "--output", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.startswith("error: --num = 0: ")
