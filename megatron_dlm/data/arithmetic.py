"""Generated grade-school arithmetic word problems with step-by-step answers.

    python -m megatron_dlm.data.arithmetic --split train --num 1000 --seed 1 --output train.jsonl

A problem is a starting number and two or three operations, told in short sentences; its response
computes one operation a line and ends in ``#### n``. A hash of the arithmetic content (numbers and
operations, not names or wording) decides whether a problem is for training or held out, so training
never contains a held-out problem, under any seed.
"""

import argparse
import hashlib
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import orjson

from megatron_dlm.data.arithmetic_text import SCENES, Scene, render
from megatron_dlm.entry import report_user_errors
from megatron_dlm.errors import bad_value
from megatron_dlm.output_file import replaced_file

Split = Literal["train", "heldout"]
Symbol = Literal["+", "-", "*"]

SPLITS: tuple[Split, ...] = ("train", "heldout")
MIN_OPERATIONS, MAX_OPERATIONS = 2, 3
MIN_START, MAX_START = 2, 30
MAX_ADDEND = 9
MIN_FACTOR, MAX_FACTOR = 2, 3
MAX_VALUE = 60
"""Every number of a problem, given or computed, lies in 0..MAX_VALUE."""
HELDOUT_ONE_IN = 10
"""One problem in this many is held out."""

_SYMBOL_WEIGHTS: dict[Symbol, float] = {"+": 0.4, "-": 0.4, "*": 0.2}

T = TypeVar("T")


@dataclass(frozen=True)
class Operation:
    """One step of a problem: ``value <symbol> operand``."""

    symbol: Symbol
    operand: int

    def apply(self, value: int) -> int:
        """Return the value after this operation."""
        if self.symbol == "+":
            return value + self.operand
        if self.symbol == "-":
            return value - self.operand
        return value * self.operand


@dataclass(frozen=True)
class Problem:
    """The arithmetic content of a word problem, without its wording."""

    start: int
    operations: tuple[Operation, ...]

    @property
    def values(self) -> tuple[int, ...]:
        """The start and the value after each operation; one longer than `operations`."""
        values = [self.start]
        for operation in self.operations:
            values.append(operation.apply(values[-1]))
        return tuple(values)

    @property
    def answer(self) -> str:
        """The last value."""
        return str(self.values[-1])

    @property
    def response(self) -> str:
        """One line per operation, then ``#### answer``."""
        lines = [
            f"{before} {operation.symbol} {operation.operand} = {after}"
            for before, operation, after in zip(
                self.values[:-1], self.operations, self.values[1:], strict=True
            )
        ]
        return "\n".join([*lines, f"#### {self.answer}"])

    @property
    def key(self) -> str:
        """The arithmetic content as text, for example ``12+5*2``; equal for equal content."""
        return str(self.start) + "".join(f"{o.symbol}{o.operand}" for o in self.operations)

    @property
    def split(self) -> Split:
        """The split this content belongs to, under every seed and on every machine."""
        digest = hashlib.sha256(self.key.encode()).digest()
        held_out = int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0
        return "heldout" if held_out else "train"


def generate_example(split: Split, seed: int, index: int) -> dict[str, Any]:
    """Generate one example from its index alone.

    Args:
        split: The split that the problem belongs to.
        seed: Of the sequence of examples.
        index: Position in that sequence, from 0; no other example has to be generated for it.

    Returns:
        ``{"messages": [{"role": "user", "content": ...}], "response": ..., "answer": ...}``.
    """
    # Only Random.random() is guaranteed to give the same numbers in every Python version.
    rng = random.Random(f"{split}:{seed}:{index}")
    problem = _draw_problem(rng)
    while problem.split != split:
        problem = _draw_problem(rng)
    question = _tell(problem, rng)
    return {
        "messages": [{"role": "user", "content": question}],
        "response": problem.response,
        "answer": problem.answer,
    }


def examples(split: Split, seed: int, start: int = 0) -> Iterator[dict[str, Any]]:
    """Iterate without end over the examples of a split from index `start` on."""
    index = start
    while True:
        yield generate_example(split, seed, index)
        index += 1


def write_examples(path: Path, split: Split, seed: int, num: int) -> None:
    """Write examples 0..num-1 of (split, seed) as JSONL, creating the folder if needed."""
    _write_records(path, (generate_example(split, seed, index) for index in range(num)))


def write_documents(path: Path, split: Split, seed: int, num: int) -> None:
    """Write the same problems as plain text, question and solution, for a pretraining corpus."""
    generated = (generate_example(split, seed, index) for index in range(num))
    texts = (f"{e['messages'][0]['content']}\n{e['response']}" for e in generated)
    _write_records(path, ({"text": text} for text in texts))


def _write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path, "--output") as temporary, temporary.open("wb") as file:
        for record in records:
            file.write(orjson.dumps(record) + b"\n")


def _draw_problem(rng: random.Random) -> Problem:
    start = _between(rng, MIN_START, MAX_START)
    operations: list[Operation] = []
    value = start
    for _ in range(_between(rng, MIN_OPERATIONS, MAX_OPERATIONS)):
        operation = _draw_operation(value, rng)
        operations.append(operation)
        value = operation.apply(value)
    return Problem(start, tuple(operations))


def _draw_operation(value: int, rng: random.Random) -> Operation:
    """Draw an operation that keeps the value in 0..MAX_VALUE."""
    largest: dict[Symbol, int] = {
        "+": min(MAX_ADDEND, MAX_VALUE - value),
        "-": min(MAX_ADDEND, value),
        "*": min(MAX_FACTOR, MAX_VALUE // value) if value else 0,
    }
    smallest: dict[Symbol, int] = {"+": 1, "-": 1, "*": MIN_FACTOR}
    possible = [symbol for symbol in _SYMBOL_WEIGHTS if largest[symbol] >= smallest[symbol]]
    symbol = _weighted(rng, possible, [_SYMBOL_WEIGHTS[symbol] for symbol in possible])
    return Operation(symbol, _between(rng, smallest[symbol], largest[symbol]))


def _tell(problem: Problem, rng: random.Random) -> str:
    """Put a problem into words."""
    scene: Scene = _choice(rng, SCENES)
    words = {slot: _choice(rng, entries) for slot, entries in scene.slots.items()}
    sentences = [render(_choice(rng, scene.opening), words, problem.start)]
    for operation in problem.operations:
        template = _choice(rng, scene.templates(operation.symbol, operation.operand))
        sentences.append(render(template, words, operation.operand))
    sentences.append(render(_choice(rng, scene.question), words))
    return " ".join(sentences)


def _between(rng: random.Random, low: int, high: int) -> int:
    return low + int(rng.random() * (high - low + 1))


def _choice(rng: random.Random, entries: Sequence[T]) -> T:
    return entries[int(rng.random() * len(entries))]


def _weighted(rng: random.Random, entries: Sequence[T], weights: Sequence[float]) -> T:
    point = rng.random() * sum(weights)
    for entry, weight in zip(entries, weights, strict=True):
        point -= weight
        if point < 0:
            return entry
    return entries[-1]


@report_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Write a JSONL file of examples; exit status 2 for arguments that cannot work."""
    parser = argparse.ArgumentParser(description="Generate arithmetic word problems as JSONL.")
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--num", type=int, required=True, help="number of examples")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to write")
    options = parser.parse_args(arguments)
    if options.num < 1:
        raise bad_value("--num", options.num, "no example to write", "ask for at least 1")
    write_examples(options.output, options.split, options.seed, options.num)
    return 0


if __name__ == "__main__":
    sys.exit(main())
