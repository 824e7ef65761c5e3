"""Plain Python values as JSON, between a program and its tests; runs inside, without this package.

Nothing that is read here runs code: classes are not transferred, and comparisons of what arrives
are those of built-in types.
"""

from __future__ import annotations

import collections
import decimal
import fractions
import itertools
import json
import operator
import os
from collections.abc import Callable, Iterable
from typing import Any

# Longest iterator that is read to its end.
MOST_ITEMS = 1_000_000


def encode(value: Any, handle_of: Callable[[Any], int]) -> Any:
    """As a tree for JSON.

    Args:
        value: Any value.
        handle_of: From an object that is no plain value to its number; may refuse by raising.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        number = int(value)
        return number if abs(number) < 1 << 62 else {"int": hex(number)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)

    def items(values: Iterable[Any]) -> list[Any]:
        return [encode(item, handle_of) for item in values]

    if isinstance(value, list | collections.deque):
        name = "deque" if isinstance(value, collections.deque) else "list"
        return items(value) if name == "list" else {name: items(value)}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: items(value)}
    if isinstance(value, dict):
        return {"dict": [[encode(k, handle_of), encode(v, handle_of)] for k, v in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": items((value.start, value.stop, value.step))}
    if isinstance(value, fractions.Fraction):
        return {"fraction": items((value.numerator, value.denominator))}
    if isinstance(value, decimal.Decimal):
        return {"decimal": str(value)}
    if isinstance(value, type({}.keys())):
        return {"keys": items(value)}
    if isinstance(value, type({}.values()) | type({}.items())):
        return items(value)
    if hasattr(type(value), "__next__"):
        found = list(itertools.islice(value, MOST_ITEMS + 1))
        if len(found) > MOST_ITEMS:
            raise ValueError(f"an iterator of more than {MOST_ITEMS} items")
        return {"iterator": items(found)}
    return {"handle": handle_of(value)}


def decode(tree: Any, object_of: Callable[[int], Any]) -> Any:
    """Undo `encode`.

    Args:
        tree: From JSON.
        object_of: From a number to the object that stands for it.

    Raises:
        Exception: It is no such tree.
    """
    if isinstance(tree, list):
        return [decode(item, object_of) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "int":
        return int(content, 16)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "decimal":
        return decimal.Decimal(content)
    if kind == "handle":
        return object_of(operator.index(content))
    if kind == "dict":
        return {decode(k, object_of): decode(v, object_of) for k, v in content}
    items = [decode(item, object_of) for item in content]
    if kind == "complex":
        return complex(*items)
    if kind == "range":
        return range(*items)
    if kind == "fraction":
        return fractions.Fraction(*items)
    build: dict[str, Callable[[list[Any]], Any]] = {
        "tuple": tuple,
        "set": set,
        "frozenset": frozenset,
        "deque": collections.deque,
        "keys": lambda keys: dict.fromkeys(keys).keys(),
        "iterator": iter,
    }
    return build[kind](items)


class Channel:
    """Lines of JSON over a socket."""

    def __init__(self, descriptor: int) -> None:
        self._reading = os.fdopen(descriptor, "rb", closefd=False)
        self._writing = os.fdopen(descriptor, "wb", closefd=False)

    def send(self, message: Any) -> None:
        """Send one message."""
        self._writing.write(json.dumps(message).encode() + b"\n")
        self._writing.flush()

    def receive(self) -> Any:
        """The next message.

        Raises:
            EOFError: The other side has ended.
        """
        line = self._reading.readline()
        if not line:
            raise EOFError("the program has ended")
        return json.loads(line)
