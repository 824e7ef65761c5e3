"""Plain values into the types of their options, and what is wrong with one in one line.

pydantic checks the types, strictly: `true` is no 1. Text of another type is read first, as the
command line writes it wherever it comes from, so that a flag, a YAML key and a key of a checkpoint
mean the same.
"""

import contextlib
import dataclasses
import difflib
import functools
import json
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from megatron_dlm.config.fields import (
    INVOCATION_FIELDS,
    OptionField,
    option_fields,
    split_optional,
    with_values,
)
from megatron_dlm.config.marks import Text
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.ranges import Range

T = TypeVar("T")


def read_values(
    cls: type,
    values: Mapping[str, Any],
    source: str = "configuration",
    lines: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Read a flat mapping of plain values into names (underscores) and values of options.

    Args:
        cls: The options class.
        values: Names (dashes or underscores) to plain values.
        source: What the mapping was read from, for errors.
        lines: Line number of each key in the source, for errors.

    Raises:
        UserError: An unknown name, or a value of the wrong type.
    """
    table = {n: o for n, o in option_fields(cls).items() if n not in INVOCATION_FIELDS}
    read = {}
    for key, value in values.items():
        place = f"{source}:{lines[key]}" if lines and key in lines else source
        name = str(key).replace("-", "_")
        if name not in table:
            raise unknown_name(place, str(key), table, "key")
        read[name] = coerce(table[name], value, f"{place}: {name}")
    return read


def build(cls: type[T], values: Mapping[str, Any], source: str = "configuration") -> T:
    """Build an options object from a flat mapping of plain values; the others keep their default.

    Raises:
        UserError: An unknown name, or a value of the wrong type.
    """
    return with_values(cls(), read_values(cls, values, source))


def coerce(option: OptionField, value: Any, where: str) -> Any:
    """Turn a plain value, which the user wrote under `where`, into the type of its option.

    Raises:
        UserError: The value is not of the option's type.
    """
    try:
        read = _read_text(option.type | None if option.optional else option.type, value)
        optional = read is None and option.optional
        return None if optional else _type(option.type, option.range).validate_python(read)
    except ValidationError as error:
        # A key that does not exist explains one that is missing.
        first = min(error.errors(), key=lambda e: e["type"] not in UNKNOWN_KEY)
        raise _user_error(first, option, value, where) from None
    except (RecursionError, ValueError) as error:  # broken, deep, numbers of thousands of digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg} at character {error.pos}"
        remedy = "write JSON, between '...' in a shell"
        raise bad_value(where, value, f"is not JSON ({reason})", remedy) from None


@functools.cache
def _type(kind: Any, bounds: Range | None) -> TypeAdapter[Any]:
    kind = Text if kind is str else kind
    if bounds is not None and typing.get_origin(kind) is dict:
        kind = dict[str, Annotated[int, AfterValidator(bounds.check)]]
    elif bounds is not None:
        kind = Annotated[kind, AfterValidator(bounds.check)]
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def _read_text(kind: Any, value: Any) -> Any:
    """Read what is text of another type, at any depth; what is not is left for pydantic to refuse.

    Raises:
        ValueError, RecursionError: Text of a list or mapping is not JSON.
    """
    kind, optional = split_optional(kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, str):
        if optional and value in ("none", "null", "None"):
            return None
        if kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value)
        between_commas = origin is tuple and not value.lstrip().startswith(("[", "{"))
        if between_commas and not dataclasses.is_dataclass(arguments[0]):
            value = value.split(",")
        elif origin in (tuple, dict):
            value = json.loads(value)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_read_text(arguments[0], each) for each in value)
    if origin is dict and isinstance(value, dict):
        return {key: _read_text(arguments[1], each) for key, each in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        kinds = typing.get_type_hints(kind)
        return {key: _read_text(kinds.get(key), each) for key, each in value.items()}
    return value


UNKNOWN_KEY = ("unexpected_keyword_argument", "invalid_key")


def _user_error(error: ErrorDetails, option: OptionField, given: Any, where: str) -> UserError:
    """What pydantic found, with the place and the remedy."""
    kind, place = error["type"], list(error["loc"])
    first, *others = typing.get_args(option.type) or (None,)
    key = place.pop() if kind in (*UNKNOWN_KEY, "missing") else None
    if place[-1:] == ["[key]"]:
        kind, place = "dict_type", place[:-2]
    where += "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    value = error["input"] if place else given
    wrong = "has no value" if value is None else "has the wrong type"
    number = "write a number such as 0.5 or 1e-5"
    text = "write text that is not empty (quote it in YAML when it looks like a number)"
    examples = {(int,): '{"math": 4096}', (str,): '{"math": " Think."}'}
    example = examples.get(tuple(others), '{"enable_thinking": false}')
    names = ", ".join(option_fields(first)) if dataclasses.is_dataclass(first) else ""
    is_choice = typing.get_origin(option.type) is Literal
    choices = typing.get_args(option.type if is_choice else first)
    near = nearest_name(str(value), choices)
    hint = f" (did you mean {near}?)" if near else ""
    choice = ("is not a choice", f"choose {' or '.join(choices)}{hint}")
    if kind == "value_error":
        return bad_value(where, error["input"], *error["ctx"]["error"].args)
    if kind in UNKNOWN_KEY:
        return bad_value(where, key, "is not a known key", f"use {names}")
    messages = {
        "bool_type": (wrong, "write true or false"),
        "int_type": (wrong, "write a whole number such as 4"),
        "float_type": (wrong, number),
        "finite_number": (wrong, number),
        "string_too_short": ("is empty", "write some text, or leave the option out"),
        "string_pattern_mismatch": ("holds a NUL character", "leave it out"),
        "literal_error": (wrong, f"write one of {', '.join(choices)}") if value is None else choice,
        "tuple_type": (wrong if value is None else "is not a list", "write a list"),
        "dict_type": (wrong, f"write a mapping such as {example}"),
        "dataclass_type": ("is not a mapping", f"write {{{names}}}"),
        "missing": (f"lacks {key}", f"add {key}"),
    }
    return bad_value(where, value, *messages.get(kind, (wrong, text)))


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when none is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown_name(where: str, name: str, known: Iterable[str], what: str) -> UserError:
    """The error for a name that no option has, with the nearest one that exists."""
    near = nearest_name(name, known)
    remedy = f"did you mean {near}?" if near else "see --help for the names that exist"
    return bad_value(where, name, f"is not a known {what}", remedy)
