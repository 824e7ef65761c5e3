"""Code of a response passes the tests of its record, in the sandbox."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dlm.data.prompts import PromptDataset
from megatron_dlm.evaluation.rewards.base import RIGHT, Record, field_of, unrated, without_thinking
from megatron_dlm.sandbox.code_tests import CallTests, CodeRunner, CodeTests, TextTests
from megatron_dlm.sandbox.isolation import isolation

_FENCED = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.S | re.M)


def code_of(response: str, entry_point: str | None = None) -> str:
    """The program of a response: its last block of Python, or all of it if it has no blocks.

    Of several blocks, the last that defines `entry_point` counts, if one does.
    """
    blocks = [text for kind, text in _FENCED.findall(response) if kind.lower() in _PYTHON]
    if not blocks:
        return response
    if entry_point is not None:
        defining = re.compile(rf"^\s*(?:async\s+)?(?:def|class)\s+{re.escape(entry_point)}\b", re.M)
        blocks = [block for block in blocks if defining.search(block)] or blocks
    return str(blocks[-1])


_PYTHON = ("", "python", "python3", "py")


def tests_of(record: Record, where: str) -> CodeTests:
    """The tests of a record.

    Raises:
        UserError: There are none that can be run.
    """
    tests: Mapping[str, Any] = field_of(record, "tests", dict, where, "an object with tests")
    cases, calls = tests.get("cases"), tests.get("calls")
    if cases and all(
        isinstance(case, Sequence) and len(case) == 2 and all(isinstance(t, str) for t in case)
        for case in cases
    ):
        return TextTests([(stdin, stdout) for stdin, stdout in cases])
    if calls and all(isinstance(source, str) for source in calls):
        setup, entry_point = tests.get("setup") or "", tests.get("entry_point") or None
        for name, source in (("setup", setup), ("entry_point", entry_point)):
            if not isinstance(source, str | None):
                raise unrated(where, f'"tests": "{name}" = {source!r} is no text')
        return CallTests(calls, setup, entry_point)
    raise unrated(
        where,
        f'"tests" = {dict(tests)!r} has neither "calls", a list of sources, nor "cases", a list of '
        "pairs of input and output",
    )


def _check_sources(sources: Sequence[str], where: str) -> None:
    """Check that tests are Python: no program passes others.

    Raises:
        UserError: One is not.
    """
    for source in sources:
        try:
            ast.parse(source)
        except (SyntaxError, ValueError) as error:
            raise unrated(where, f'"tests": {source[:200]!r} is no Python ({error})') from error


@dataclass(frozen=True)
class CodeReward:
    """The share of a record's tests that pass before one fails; 1 if all do.

    `tests` of a record has `calls` (sources that call the program's functions; `setup` is run
    before them, `entry_point` names the function) or `cases` (pairs of standard input and output);
    `program_start` is put before the code of a response.

    Attributes:
        unsafe: Whether code may run without isolation where the machine allows none.
    """

    unsafe: bool = False

    def check(self, prompts: PromptDataset) -> None:
        """See `Reward`."""
        isolation("reward", "code_tests", unsafe=self.unsafe)
        for where, record in prompts.file.records():
            tests = tests_of(record, where)
            if isinstance(tests, CallTests):
                _check_sources([tests.setup, *tests.tests], where)
            start = record.get("program_start")
            if not isinstance(start, str | None):
                raise unrated(where, f'"program_start" = {start!r} is no text')

    def rate(self, records: Sequence[Record], responses: Sequence[str]) -> list[float]:
        """See `Reward`; programs run in parallel."""
        runner = CodeRunner(isolation("reward", "code_tests", unsafe=self.unsafe))
        verdicts = runner.run(
            (program_of(record, response), tests_of(record, "a prompt"))
            for record, response in zip(records, responses, strict=True)
        )
        return [
            RIGHT if verdict.is_right else min(verdict.passed / verdict.total, 0.99)
            for verdict in verdicts
        ]


def program_of(record: Record, response: str) -> str:
    """The program to test."""
    entry_point = record["tests"].get("entry_point")
    code = code_of(without_thinking(response), entry_point)
    return f"{record.get('program_start') or ''}{code}"
