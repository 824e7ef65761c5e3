"""Runs tests of a program that lies on the other side of a channel; without this package.

python tests_process.py CHANNEL VERDICT: tests.json beside it has `setup` (source that is run
first), `tests` (sources, each run after it) and `entry_point` (a name that is the program's even
where `setup` defines it; None for none). One line of JSON goes to the descriptor VERDICT: how many
tests passed, in order, and what the first that failed said.

A name that the tests do not define is the program's, unless it is a builtin or a module of the
standard library.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wire import Channel, decode, encode


class Program:
    """The other side."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply.

        Raises:
            Exception: What the program raised, where that is a built-in exception.
        """
        self._channel.send(request)
        reply = self._channel.receive()
        if "error" in reply:
            kind = getattr(builtins, str(reply["error"]), None)
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                raise RuntimeError(f"{reply['error']}: {reply.get('text')}")
            try:
                error = kind(str(reply.get("text")))
            except TypeError:  # UnicodeDecodeError, ...
                error = RuntimeError(f"{reply['error']}: {reply.get('text')}")
            raise error
        return reply

    def value(self, request: dict[str, Any]) -> Any:
        """The plain value of a reply, or what stands for an object."""
        return decode(self.ask(request)["value"], self._object)

    def call(self, target: int, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
        """Call an object; lists, sets and dicts among the arguments change as they did there."""
        request = {
            "kind": "call",
            "target": target,
            "arguments": encode(list(arguments), number_of),
            "keywords": encode(dict(keywords), number_of),
        }
        reply = self.ask(request)
        for before, tree in zip(arguments, reply["arguments"], strict=True):
            if type(before) in (list, set, dict):
                update(before, decode(tree, lambda number: None))
        return decode(reply["value"], self._object)

    def _object(self, number: int) -> RemoteObject:
        return RemoteObject(self, number)


def update(before: Any, now: Any) -> None:
    """Give a container the content of another; what stayed the same stays the same object."""
    if type(now) is not type(before) or before == now:
        return
    before.clear()
    if isinstance(before, list):
        before.extend(now)
    else:
        before.update(now)


def number_of(value: Any) -> int:
    """Number of an object of the other side."""
    if isinstance(value, RemoteObject):
        return int(object.__getattribute__(value, "_number"))
    raise TypeError(f"a {type(value).__name__} of the tests cannot be handed to the program")


class RemoteObject:
    """A function, class or instance of the program; only called, and its attributes used."""

    def __init__(self, program: Program, number: int) -> None:
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call it on its side."""
        return self._program.call(self._number, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        return self._program.value({"kind": "get", "target": self._number, "name": name})

    def __setattr__(self, name: str, value: Any) -> None:
        arguments = encode([value], number_of)
        request = {"kind": "set", "target": self._number, "name": name, "arguments": arguments}
        self._program.ask(request)

    def __bool__(self) -> bool:
        raise TypeError("the program's object is no plain value: it is neither true nor false")

    def __eq__(self, other: object) -> bool:
        raise TypeError("the program's object is no plain value: nothing is equal to it")

    def __ne__(self, other: object) -> bool:
        raise TypeError("the program's object is no plain value: nothing is unequal to it")

    __hash__ = None  # type: ignore[assignment]


class Names(dict[str, Any]):
    """Globals of the tests; others come from the program."""

    def __init__(self, program: Program, called: set[str]) -> None:
        super().__init__(__name__="tests")
        self._program = program
        self._called = called

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            raise KeyError(name)
        if name in sys.stdlib_module_names and name not in self._called:
            self[name] = importlib.import_module(name)
        else:
            self[name] = self._program.value({"kind": "global", "name": name})
        return self[name]


def names_called(sources: Sequence[str]) -> set[str]:
    """Names that stand before brackets."""
    return {
        node.func.id
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }


def run(job: dict[str, Any], program: Program) -> dict[str, Any]:
    """The verdict."""
    passed, error = 0, None
    try:
        names = Names(program, names_called([job["setup"], *job["tests"]]))
        exec(compile(job["setup"], "setup", "exec"), names)
        if job["entry_point"] is not None:
            request = {"kind": "global", "name": job["entry_point"]}
            names[job["entry_point"]] = program.value(request)
        for number, source in enumerate(job["tests"], start=1):
            exec(compile(source, f"test {number}", "exec"), names)
            passed = number
    except BaseException as failure:
        error = f"{type(failure).__name__}: {failure}"[:1000]
    return {"passed": passed, "error": error}


if __name__ == "__main__":
    job = json.loads(Path("tests.json").read_bytes())
    verdict = run(job, Program(Channel(int(sys.argv[1]))))
    os.write(int(sys.argv[2]), json.dumps(verdict).encode() + b"\n")
