"""Tests of a program, with a verdict that the program cannot forge.

A program that is tested by calls lies in one sandbox and its tests in another; between them go
plain values only. A program that reads and writes text is compared from outside. Wherever it is,
the verdict is made where the program is not: it can leave, lie about its exit status, replace
`assert`, or return objects that are equal to everything, and fails.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from megatron_dlm.sandbox.isolation import Isolation
from megatron_dlm.sandbox.process import Limits, Outcome, Program, run_programs


@dataclass(frozen=True)
class Verdict:
    """What tests say of a program.

    Attributes:
        passed: Tests that passed before the first that failed.
        total: Tests.
        error: Of the first that failed, in one line; None if all passed.
    """

    passed: int
    total: int
    error: str | None

    @property
    def is_right(self) -> bool:
        """Whether all passed, and there were some."""
        return self.passed == self.total > 0 and self.error is None


class CodeTests(Protocol):
    """Decides whether a program is right."""

    def run(self, program: str, limits: Limits, isolation: Isolation) -> Verdict:
        """Test a program, given as source."""


@dataclass(frozen=True)
class CallTests:
    """Tests in Python that call the program's functions.

    Attributes:
        tests: Sources, run in order; one that raises has failed.
        setup: Source that is run before them, on their side.
        entry_point: A name that is the program's even where `setup` defines it.
    """

    tests: Sequence[str]
    setup: str = ""
    entry_point: str | None = None

    def run(self, program: str, limits: Limits, isolation: Isolation) -> Verdict:
        """See `CodeTests`."""
        asking, answering = socket.socketpair()
        reading, writing = os.pipe()
        ends = asking.detach(), answering.detach()
        content = {"setup": self.setup, "tests": list(self.tests), "entry_point": self.entry_point}
        wire = _source("wire.py")
        sides = [
            Program(
                files={
                    "wire.py": wire,
                    "main.py": _source("tests_process.py"),
                    "tests.json": json.dumps(content),
                },
                arguments=[*_WITH_FOLDER, "main.py", str(ends[0]), str(writing)],
                channels=[ends[0], writing],
            ),
            Program(
                files={
                    "wire.py": wire,
                    "main.py": _source("program_process.py"),
                    "program.py": program,
                },
                arguments=[*_WITH_FOLDER, "main.py", str(ends[1])],
                channels=[ends[1]],
            ),
        ]
        try:
            outcomes = run_programs(sides, limits, isolated=isolation != "none")
            # Every process that could write here has ended.
            said = os.read(reading, 1 << 16)
        finally:
            os.close(reading)
        if said:
            verdict = json.loads(said)
            return Verdict(verdict["passed"], len(self.tests), verdict["error"])
        return Verdict(0, len(self.tests), _how_it_ended(outcomes))


@dataclass(frozen=True)
class TextTests:
    """Pairs of standard input and expected standard output; the program runs once for each.

    Outputs are equal if their lines are, without blanks at their ends and empty lines at the end;
    words that are numbers are compared as numbers.
    """

    cases: Sequence[tuple[str, str]]

    def run(self, program: str, limits: Limits, isolation: Isolation) -> Verdict:
        """See `CodeTests`."""
        for number, (stdin, expected) in enumerate(self.cases):
            (outcome,) = run_programs(
                [Program.of(program, stdin)], limits, isolated=isolation != "none"
            )
            error = None
            if outcome.end != "exit" or outcome.code != 0:
                error = _how_it_ended([outcome])
            elif not same_output(outcome.stdout.decode("utf-8", "replace"), expected):
                error = "the output is not the expected one"
            if error is not None:
                return Verdict(number, len(self.cases), error)
        return Verdict(len(self.cases), len(self.cases), None)


# The folder of the script, which -P leaves out; program.py must not replace standard modules.
_WITH_FOLDER = (
    "-c",
    "import sys; sys.path.append('.'); del sys.argv[0]; "
    "exec(compile(open(sys.argv[0]).read(), sys.argv[0], 'exec'))",
)


@cache
def _source(name: str) -> str:
    return Path(__file__).with_name(name).read_text("utf-8")


def same_output(found: str, expected: str) -> bool:
    """Whether a program's output is the expected one."""
    lines = [[line.split() for line in text.rstrip().splitlines()] for text in (found, expected)]
    if lines[0] == lines[1]:
        return True
    if [len(line) for line in lines[0]] != [len(line) for line in lines[1]]:
        return False
    words = [[word for line in text for word in line] for text in lines]
    return all(one == other or _same_number(one, other) for one, other in zip(*words, strict=True))


def _same_number(found: str, expected: str) -> bool:
    from decimal import Decimal, InvalidOperation

    try:
        return Decimal(found) == Decimal(expected)
    except InvalidOperation:
        return False


def _how_it_ended(outcomes: Sequence[Outcome]) -> str:
    said = {
        "time": "ran past its limit of time",
        "memory": "ran past its limit of memory",
        "processes": "ran past its limit of processes",
        "output": "ran past its limit of output",
        "stopped": "was stopped",
    }
    for outcome in outcomes:
        if outcome.end in said and outcome.end != "stopped":
            return f"the program {said[outcome.end]}"
    outcome = outcomes[0]
    lines = outcome.stderr.decode("utf-8", "replace").strip().splitlines()
    last = f": {lines[-1][:300]}" if lines else ""
    return f"the program ended with status {outcome.code}{last}"


class CodeRunner:
    """Runs tests of many programs, so many at a time.

    Args:
        isolation: In force.
        limits: Of each program.
        workers: Programs at a time; None for as many as there are processors.
    """

    def __init__(
        self, isolation: Isolation, limits: Limits | None = None, workers: int | None = None
    ) -> None:
        self.isolation = isolation
        self._limits = Limits() if limits is None else limits
        self._workers = len(os.sched_getaffinity(0)) if workers is None else workers

    def run(self, pairs: Iterable[tuple[str, CodeTests]]) -> list[Verdict]:
        """Test programs, given as source; verdicts in their order."""

        def verdict(pair: tuple[str, CodeTests]) -> Verdict:
            program, tests = pair
            return tests.run(program, self._limits, self.isolation)

        with ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(verdict, pairs))
