"""Plain values into the types of their options, and what is wrong with one in one line.

pydantic checks the types, strictly: `true` is no 1. Text of another type is read first, as the
command line writes it, so that a flag, a YAML key and a key of a checkpoint mean the same.
"""

import contextlib
import dataclasses
import functools
import json
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_dlm.config import fields
from megatron_dlm.config.fields import OptionField, option_fields
from megatron_dlm.errors import UserError, bad_value, nearest_name, unknown_name
from megatron_dlm.ranges import Range

T = TypeVar("T")


def read_values(
    cls: type, values: Mapping[str, Any], source: str, lines: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Read plain values by name (dashes or underscores) from a source, at these lines of it.

    Raises:
        UserError: An unknown name, or a value of the wrong type.
    """
    table = {n: o for n, o in option_fields(cls).items() if n not in fields.INVOCATION_FIELDS}
    read = {}
    for key, value in values.items():
        place = f"{source}:{lines[key]}" if lines and key in lines else source
        name = str(key).replace("-", "_")
        if name not in table:
            raise unknown_name(place, str(key), table, "key")
        read[name] = coerce(table[name], value, f"{place}: {name}")
    return read


def build(cls: type[T], values: Mapping[str, Any], source: str = "configuration") -> T:
    """Build an options object from plain values by name; the others keep their default.

    Raises:
        UserError: An unknown name, or a value of the wrong type.
    """
    return fields.with_values(cls(), read_values(cls, values, source))


def coerce(option: OptionField, value: Any, where: str) -> Any:
    """Turn a plain value, which the user wrote under `where`, into the type of its option.

    Raises:
        UserError: The value is not of the option's type, or is out of its range.
    """
    if option.optional and value in (None, "none", "null", "None"):
        return None
    if option.type is str and value == "":
        raise bad_value(where, value, "is empty", "write some text, or leave the option out")
    if option.type is str and isinstance(value, str) and "\0" in value:
        raise bad_value(where, value, "holds a NUL character", "leave it out")
    return _read(option.type, option.range, fields.plain_value(value), where)


def _read(kind: Any, bounds: Range | None, value: Any, where: str) -> Any:
    """A value of an option, or an entry of one."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, str):
        value = _from_text(origin or kind, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_read(members[0], bounds, v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {k: _read(members[1], bounds, v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _entry(kind, value, where)
    # pydantic refuses names of files that are no UTF-8 or were read in an ASCII locale.
    if kind is str and isinstance(value, str):
        return value
    try:
        read = _adapter(kind).validate_python(value)
    except ValidationError:
        raise _wrong_type(kind, value, where) from None
    if bounds is not None and read not in bounds:
        raise bad_value(where, value, bounds.problem, bounds.remedy)
    return read


def _entry(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass of options that is one entry of a list."""
    table = option_fields(cls)
    for name in values:
        if name not in table:
            raise bad_value(where, name, "is not a known key", f"use {', '.join(table)}")
    for name, option in table.items():
        if option.default is dataclasses.MISSING and name not in values:
            raise bad_value(where, values, f"lacks {name}", f"add {name}")
    return cls(**{n: coerce(table[n], value, f"{where}.{n}") for n, value in values.items()})


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    kind = dict[str, Any] if dataclasses.is_dataclass(kind) else kind
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def _from_text(kind: Any, text: str, where: str) -> Any:
    """What text means as an option of a type; text that is none is left for pydantic to refuse."""
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    if kind is tuple and not text.lstrip().startswith(("[", "{")):
        return text.split(",")
    try:
        return json.loads(text) if kind in (tuple, dict) else text
    except (RecursionError, ValueError) as error:  # numbers of thousands of digits too
        remedy = "write JSON, between '...' in a shell"
        raise bad_value(where, text, f"is not JSON ({error})", remedy) from None


_REMEDIES = {
    bool: "write true or false",
    int: "write a whole number such as 4",
    float: "write a number such as 0.5 or 1e-5",
    str: "write text that is not empty (quote it in YAML when it looks like a number)",
    tuple: 'write a list such as ["a", "b"]',
    dict: 'write a mapping such as {"name": value}',
}


def _wrong_type(kind: Any, value: Any, where: str) -> UserError:
    """The error for a value that pydantic refuses, with what to write instead."""
    problem = "has no value" if value is None else "has the wrong type"
    names = ", ".join(option_fields(kind)) if dataclasses.is_dataclass(kind) else ""
    remedy = _REMEDIES.get(typing.get_origin(kind) or kind, f"write {{{names}}}")
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        near = nearest_name(str(value), choices)
        problem = problem if value is None else "is not a choice"
        remedy = f"choose {' or '.join(choices)}" + (f" (did you mean {near}?)" if near else "")
    return bad_value(where, value, problem, remedy)
