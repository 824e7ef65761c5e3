"""HumanEval, MBPP and LiveCodeBench: programs that have to pass tests."""

import base64
import json
import zlib
from typing import Any

from megatron_dlm.evaluation.tasks.base import Record, Task, ask

_FENCE = "```"
_WRITE = "Put the complete program into one block of code that begins with ```python."


def _humaneval(record: Record) -> Record:
    """The prompt's own definitions are the tests' set-up: helpers there are not the program's."""
    start, name = record["prompt"], record["entry_point"]
    tests = {
        "setup": f"{start.rstrip()}\n    pass\n\n{record['test']}",
        "calls": [f"check({name})"],
        "entry_point": name,
    }
    text = f"Complete this Python function. {_WRITE}\n\n{_FENCE}python\n{start.rstrip()}\n{_FENCE}"
    # Imports and helpers of the prompt, should the response leave them out.
    return ask(text, tests=tests, program_start=f"{start.rstrip()}\n    pass\n\n")


def _mbpp(record: Record) -> Record:
    """Both forms: `text` and `test_setup_code` of the whole set, `prompt` and `test_imports`."""
    calls = list(record["test_list"])
    if not calls:
        raise ValueError("no tests")
    setup = "\n".join([*record.get("test_imports", ()), record.get("test_setup_code", "")])
    text = record.get("text") or record["prompt"]
    shown = "\n".join(calls)
    text = f"{text}\nThe program has to pass these tests:\n\n{shown}\n\n{_WRITE}"
    return ask(text, tests={"setup": setup, "calls": calls})


def _livecodebench(record: Record) -> Record:
    """Public and hidden tests: of standard input, or of a method of class Solution."""
    cases = _cases(record["public_test_cases"]) + _hidden(record.get("private_test_cases"))
    if not cases:
        raise ValueError("no tests")
    start, text = record.get("starter_code") or "", record["question_content"]
    if cases[0]["testtype"] == "functional":
        metadata = record.get("metadata") or "{}"
        name = (json.loads(metadata) if isinstance(metadata, str) else metadata)["func_name"]
        calls = [
            f"assert _plain(Solution().{name}(*{[json.loads(line) for line in _lines(case)]!r}))"
            f" == {json.loads(case['output'])!r}"
            for case in cases
        ]
        tests: dict[str, Any] = {"calls": calls, "setup": _PLAIN}
        text += f"\n\nBegin with this:\n\n{_FENCE}python\n{start.rstrip()}\n{_FENCE}"
    else:
        tests = {"cases": [[case["input"], case["output"]] for case in cases]}
        text += "\n\nThe program reads standard input and writes standard output."
    return ask(f"{text}\n\n{_WRITE}", tests=tests, program_start=_IMPORTS)


_PLAIN = """
def _plain(value):
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
"""
"""Tuples are as good as the lists that JSON has."""

_IMPORTS = """\
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
from builtins import *  # pow is not that of math
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys

"""
"""What solutions of these sites take for granted."""


def _lines(case: dict[str, str]) -> list[str]:
    return [line for line in case["input"].split("\n") if line.strip()]


def _cases(text: Any) -> list[dict[str, str]]:
    return list(json.loads(text)) if isinstance(text, str) else list(text)


def _hidden(text: Any) -> list[dict[str, str]]:
    """Plain JSON, or base64 of zlib of a pickle of one text, which is not executed."""
    if not text:
        return []
    try:
        return _cases(text)
    except ValueError:
        return _cases(_pickled_text(zlib.decompress(base64.b64decode(text))))


def _pickled_text(content: bytes) -> str:
    """The one string that a pickle holds; no pickle is loaded, for that can run code.

    Raises:
        ValueError: It holds anything else.
    """
    import pickletools

    texts = [
        argument
        for operation, argument, _ in pickletools.genops(content)
        if operation.name in ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE")
    ]
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise ValueError("the hidden tests are not one text")
    return texts[0]


TASKS = (
    Task("humaneval", "code_tests", _humaneval, "openai/openai_humaneval test"),
    Task("mbpp", "code_tests", _mbpp, "google-research-datasets/mbpp full test"),
    Task(
        "livecodebench",
        "code_tests",
        _livecodebench,
        "livecodebench/code_generation_lite release_v6 test",
    ),
)
