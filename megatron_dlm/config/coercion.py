"""Plain values into the types of their options, and what is wrong with one in one line.

pydantic checks the type. Its own conversions, of `true` to 1 for one, are off; the few that there
are stand in `_accepted`: text is read as the command line writes it wherever it comes from, so that
a flag, a YAML key and a key of a checkpoint mean the same.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    AllowInfNan,
    BeforeValidator,
    ConfigDict,
    Strict,
    StrictBool,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
    create_model,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from megatron_dlm.config.fields import (
    INVOCATION_FIELDS,
    OptionField,
    construct,
    option_fields,
)
from megatron_dlm.errors import UserError, bad_value

T = TypeVar("T")


def read_values(
    cls: type,
    values: Mapping[str, Any],
    source: str = "configuration",
    lines: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Read a flat mapping of plain values.

    Args:
        cls: The options class.
        values: Names (dashes or underscores) to plain values.
        source: What the mapping was read from, for errors.
        lines: Line number of each key in the source, for errors.

    Returns:
        Names (underscores) to values of the options' types.

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
    return construct(cls, read_values(cls, values, source))


def coerce(option: OptionField, value: Any, where: str) -> Any:
    """Turn a value from YAML, JSON or the command line into the type of its option.

    Args:
        option: The option that the value is for.
        value: A plain value.
        where: What the user wrote it under, for the error.

    Raises:
        UserError: The value is not of the option's type.
    """
    try:
        return _adapter(option.type, option.optional).validate_python(value)
    except ValidationError as error:
        # A key that does not exist explains one that is missing.
        details = sorted(error.errors(), key=lambda e: e["type"] not in UNKNOWN_KEY)
        raise _user_error(details[0], option, value, where) from None


@functools.cache
def _adapter(annotation: Any, optional: bool) -> TypeAdapter[Any]:
    return TypeAdapter(_accepted(annotation, optional))


def _accepted(annotation: Any, optional: bool = False) -> Any:
    """The type as pydantic takes it: strict, but for text as the command line writes it."""
    accepted: Any
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _SCALARS:
        accepted = _SCALARS[annotation]
    elif origin is dict:
        # The text of an entry, unlike that of an option, may be empty.
        entry = StrictStr if arguments[1] is str else _accepted(arguments[1])
        accepted = Annotated[dict[StrictStr, entry], BeforeValidator(_json_of_text)]  # type: ignore[valid-type]
    elif origin is tuple:
        is_record = dataclasses.is_dataclass(arguments[0])
        read = functools.partial(_list_of_text, always_json=is_record)
        entry = _accepted(arguments[0])
        accepted = Annotated[tuple[entry, ...], Strict(), BeforeValidator(read)]  # type: ignore[valid-type]
    elif dataclasses.is_dataclass(annotation):
        accepted = _accepted_record(typing.cast(type, annotation))
    elif origin is Literal or annotation is Any:
        accepted = annotation
    else:
        raise TypeError(f"options of type {annotation} are not supported")
    if not optional:
        return accepted
    none = BeforeValidator(lambda value: None if value in ("none", "null", "None") else value)
    return Annotated[accepted | None, none]


def _accepted_record(cls: type) -> Any:
    """A small dataclass, an entry of a list, as a mapping that names all fields without default."""
    fields: dict[str, Any] = {
        name: (
            _accepted(option.type, option.optional),
            ... if option.default is dataclasses.MISSING else option.default,
        )
        for name, option in option_fields(cls).items()
    }
    model = create_model(cls.__name__, __config__=ConfigDict(extra="forbid"), **fields)
    return Annotated[
        model,
        BeforeValidator(lambda value: vars(value) if isinstance(value, cls) else value),
        AfterValidator(lambda read: cls(**dict(read))),
    ]


def _number_of_text(kind: type[int] | type[float]) -> BeforeValidator:
    """Read a number that is text; what is none is left for the type to refuse."""

    def read(value: Any) -> Any:
        try:
            return kind(value) if isinstance(value, str) else value
        except ValueError:
            return value

    return BeforeValidator(read)


def _usable_text(text: str) -> str:
    if not text:
        raise PydanticCustomError("empty", "is empty")
    if "\0" in text:  # no path, and nothing else that an option means, can hold it
        raise PydanticCustomError("nul", "holds a NUL character")
    return text


_SCALARS = {
    bool: StrictBool,
    int: Annotated[StrictInt, _number_of_text(int)],
    float: Annotated[float, Strict(), AllowInfNan(False), _number_of_text(float)],
    str: Annotated[StrictStr, AfterValidator(_usable_text)],
}


def _json_of_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos}"
    except (RecursionError, ValueError) as error:  # deep nesting, numbers of thousands of digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    raise PydanticCustomError("not_json", "{reason}", {"reason": reason})


def _list_of_text(value: Any, always_json: bool) -> Any:
    """A list, of JSON or of text between commas, as the tuple that it becomes."""
    if isinstance(value, str):
        is_json = always_json or value.lstrip().startswith(("[", "{"))
        value = _json_of_text(value) if is_json else value.split(",")
    return tuple(value) if isinstance(value, list) else value


UNKNOWN_KEY = ("extra_forbidden", "invalid_key")


def _user_error(error: ErrorDetails, option: OptionField, given: Any, where: str) -> UserError:
    """What pydantic found, with the place and the remedy."""
    kind, place = error["type"], list(error["loc"])
    key = place.pop() if kind in (*UNKNOWN_KEY, "missing") else None
    if place[-1:] == ["[key]"]:
        place = place[:-2]
    value = error["input"] if place else given
    expected: Any = option.type
    for step in place:
        where += f"[{step}]" if isinstance(step, int) else f".{step}"
        if dataclasses.is_dataclass(expected):
            expected = option_fields(typing.cast(type, expected))[str(step)].type
        else:
            expected = typing.get_args(expected)[0 if isinstance(step, int) else 1]
    names = (
        list(option_fields(typing.cast(type, expected)))
        if dataclasses.is_dataclass(expected)
        else []
    )
    if kind in UNKNOWN_KEY:
        return bad_value(where, key, "is not a known key", f"use {', '.join(names)}")
    if kind == "missing":
        return bad_value(where, value, f"lacks {key}", f"add {key}")
    if kind == "not_json":
        return bad_value(
            where, value, f"is not JSON ({error['msg']})", "write JSON, between '...' in a shell"
        )
    if kind == "nul":
        return bad_value(where, value, error["msg"], "leave it out")
    if kind == "empty":
        return bad_value(where, value, error["msg"], "write some text, or leave the option out")
    if names:
        return bad_value(where, value, "is not a mapping", f"write {{{', '.join(names)}}}")
    if value is None:
        return bad_value(where, value, "has no value", f"write {_example(expected)}")
    if kind == "literal_error":
        choices = typing.get_args(expected)
        near = nearest_name(str(value), choices)
        hint = f" (did you mean {near}?)" if near else ""
        return bad_value(where, value, "is not a choice", f"choose {' or '.join(choices)}{hint}")
    if typing.get_origin(expected) is tuple:
        return bad_value(where, value, "is not a list", "write a list")
    return bad_value(where, value, "has the wrong type", f"write {_example(expected)}")


def _example(annotation: Any) -> str:
    """What a value of this type looks like, for remedies."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin is tuple:
        return "a list"
    if origin is dict:
        examples = {int: '{"math": 4096}', str: '{"math": " Think."}'}
        example = examples.get(arguments[1], '{"enable_thinking": false}')
        return f"a mapping such as {example}"
    return {
        bool: "true or false",
        int: "a whole number such as 4",
        float: "a number such as 0.5 or 1e-5",
        str: "text that is not empty (quote it in YAML when it looks like a number)",
    }[annotation]


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when none is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown_name(where: str, name: str, known: Iterable[str], what: str) -> UserError:
    """The error for a name that no option has, with the nearest one that exists."""
    near = nearest_name(name, known)
    remedy = f"did you mean {near}?" if near else "see --help for the names that exist"
    return bad_value(where, name, f"is not a known {what}", remedy)
