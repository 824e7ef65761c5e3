"""Loads a program and answers calls of its functions; runs inside, without this package.

python program_process.py CHANNEL: the program is program.py in the same folder. It knows neither
what its results are compared with nor what became of them.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wire import Channel, decode, encode


def serve(channel: Channel) -> None:
    """Answer until the other side ends."""
    objects: dict[int, Any] = {}

    def handle_of(value: Any) -> int:
        number = len(objects)
        objects[number] = value
        return number

    module = types.ModuleType("program")
    sys.modules["program"] = module
    source = Path("program.py").read_text("utf-8", "surrogatepass")
    sys.argv = ["program.py"]
    failure: BaseException | None = None
    try:
        exec(compile(source, "program.py", "exec"), module.__dict__)
    except BaseException as error:
        failure = error
    while True:
        request = channel.receive()
        try:
            if failure is not None:
                raise failure
            reply = answer(request, module, objects, handle_of)
        except BaseException as error:
            reply = {"error": type(error).__name__, "text": str(error)[:1000]}
        channel.send(reply)


def answer(
    request: dict[str, Any],
    module: types.ModuleType,
    objects: dict[int, Any],
    handle_of: Callable[[Any], int],
) -> dict[str, Any]:
    """The reply to one request."""
    kind, name = request["kind"], str(request.get("name"))
    if kind == "global":
        return {"value": encode(getattr(module, name), handle_of)}
    target = objects[request["target"]]
    if kind == "get":
        return {"value": encode(getattr(target, name), handle_of)}
    arguments = decode(request["arguments"], objects.__getitem__)
    if kind == "set":
        setattr(target, name, arguments[0])
        return {"value": None}
    keywords = decode(request["keywords"], objects.__getitem__)
    value = encode(target(*arguments, **keywords), handle_of)
    # A function may change a list that it is given.
    return {"value": value, "arguments": [as_it_is_now(argument) for argument in arguments]}


def as_it_is_now(argument: Any) -> Any:
    """A plain argument; None for what holds objects, which are only on this side."""

    def refuse(value: Any) -> int:
        raise TypeError

    try:
        return encode(argument, refuse)
    except TypeError:
        return None


if __name__ == "__main__":
    with contextlib.suppress(EOFError):
        serve(Channel(int(sys.argv[1])))
