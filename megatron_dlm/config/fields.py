"""The flat view of a nested options class: its fields, and plain values into and out of it.

Command line, YAML and checkpoints all use the same flat names and the same `coerce`, so a value
means the same wherever it was written. Works for any frozen dataclass whose fields are options or
groups (nested dataclasses) of options; `tools/` have such classes of their own.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

import docstring_parser
import yaml

from megatron_dlm.config.marks import FIXED
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.ranges import Range

T = TypeVar("T")

INVOCATION_FIELDS = frozenset({"config", "dry_run", "records"})
"""Fields about one invocation, or found out by it: never written to YAML or read from it."""


@dataclasses.dataclass(frozen=True)
class OptionField:
    """One option: where it lives and what it accepts.

    Attributes:
        name: Field name, unique over all groups.
        group: Name of the group that holds it; None for a field of the class itself.
        type: Resolved type annotation, without `| None`.
        optional: Whether None is allowed.
        default: Value when nobody gives one.
        range: Numbers that it may be; None: any.
        fixed_on_resume: Whether a resumed run cannot change it.
    """

    name: str
    group: str | None
    type: Any
    optional: bool
    default: Any
    range: Range | None
    fixed_on_resume: bool

    @property
    def flag(self) -> str:
        """The command-line flag."""
        return "--" + self.name.replace("_", "-")


def _split_optional(annotation: Any) -> tuple[Any, bool]:
    """Separate `X | None` into (X, True); any other annotation is (annotation, False)."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        members = [a for a in typing.get_args(annotation) if a is not type(None)]
        if len(members) != 1:
            raise TypeError(f"an option can have one type or one type and None: {annotation}")
        return members[0], True
    return annotation, False


def _split_annotated(annotation: Any) -> tuple[Any, ...]:
    """`Annotated[X, a, b]` as (X, a, b); any other annotation alone."""
    if typing.get_origin(annotation) is typing.Annotated:
        return typing.get_args(annotation)
    return (annotation,)


def option_helps(cls: type) -> dict[str, str]:
    """What each option means, by flat name, on one line: its docstring, or its metadata's help."""
    helps: dict[str, str] = {}
    for field in dataclasses.fields(cls):
        nested = typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(nested):
            helps |= option_helps(typing.cast(type, nested))
        elif "help" in field.metadata:
            helps[field.name] = field.metadata["help"]
    for base in reversed(cls.__mro__):
        # A field's docstring is in the class that declares it.
        if base.__module__ != "types" and dataclasses.is_dataclass(base):
            for param in docstring_parser.parse_from_object(base).params:
                helps[param.arg_name] = " ".join((param.description or "").split())
    return helps


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def option_fields(cls: type) -> dict[str, OptionField]:
    """All options of a class by flat name, groups opened, in the order of declaration.

    Raises:
        TypeError: Two groups declare the same name (a defect of the class, not of user input).
    """
    return _option_fields(cls)  # type checkers do not take a generic class for hashable


@functools.cache
def _option_fields(cls: Any) -> dict[str, OptionField]:
    table: dict[str, OptionField] = {}

    def add(owner: type, group: str | None) -> None:
        hints = typing.get_type_hints(owner, include_extras=True)
        for field in dataclasses.fields(owner):
            annotation, *marks = _split_annotated(hints[field.name])
            annotation, optional = _split_optional(annotation)
            if dataclasses.is_dataclass(annotation):
                add(typing.cast(type, annotation), field.name)
                continue
            if field.name in table:
                raise TypeError(f"{cls.__name__} declares {field.name} twice")
            table[field.name] = OptionField(
                field.name,
                group,
                annotation,
                optional,
                _default(field),
                next((mark for mark in marks if isinstance(mark, Range)), None),
                FIXED in marks,
            )

    add(cls, None)
    return table


def nearest_name(name: str, known: typing.Iterable[str]) -> str | None:
    """The known name most like `name`, or None when none is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def coerce(option: OptionField, value: Any, where: str) -> Any:
    """Turn a value from YAML, JSON or the command line into the type of its option.

    Strings are read as the command line writes them, so YAML's `1e-3` (a string in YAML 1.1) is a
    number too.

    Args:
        option: The option that the value is for.
        value: A plain value.
        where: What the user wrote it under, for the error.

    Raises:
        UserError: The value is not of the option's type.
    """
    if option.optional and (value is None or value in ("none", "null", "None")):
        return None
    if value is None:
        raise bad_value(where, value, "has no value", f"write {_expected(option.type)}")
    return _coerce(option.type, value, where)


def _coerce(annotation: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(annotation)
    result: Any
    if annotation is bool:
        result = value if isinstance(value, bool) else None
    elif annotation is int:
        result = _to_int(value)
    elif annotation is float:
        result = _to_float(value)
    elif annotation is str:
        result = value if isinstance(value, str) and value else None
    elif origin is Literal:
        return _to_choice(typing.get_args(annotation), value, where)
    elif origin is dict:
        result = _from_json(value, where) if isinstance(value, str) else value
        result = dict(result) if _is_plain_mapping(result) else None
        entry = typing.get_args(annotation)[1]
        if result is not None and entry is not Any:
            # The text of an entry, unlike that of an option, may be empty.
            return {
                key: value
                if entry is str and value == ""
                else _coerce(entry, value, f"{where}.{key}")
                for key, value in result.items()
            }
    elif origin is tuple:
        return _to_tuple(typing.get_args(annotation)[0], value, where)
    elif dataclasses.is_dataclass(annotation):
        return _to_record(typing.cast(type, annotation), value, where)
    else:
        raise TypeError(f"{where}: options of type {annotation} are not supported")
    if result is None:
        expected = _expected(annotation)
        raise bad_value(where, value, "has the wrong type", f"write {expected}")
    return result


def _expected(annotation: Any) -> str:
    """What a value of this type looks like, for remedies."""
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return "a list"
    if typing.get_origin(annotation) is dict:
        examples = {int: '{"math": 4096}', str: '{"math": " Think."}'}
        example = examples.get(typing.get_args(annotation)[1], '{"enable_thinking": false}')
        return f"a mapping such as {example}"
    return {
        bool: "true or false",
        int: "a whole number such as 4",
        float: "a number such as 0.5 or 1e-5",
        str: "text that is not empty (quote it in YAML when it looks like a number)",
    }.get(annotation, "a mapping")


def _to_int(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return None
    try:
        return int(value)
    except ValueError:
        return None


def _to_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _to_choice(choices: tuple[str, ...], value: Any, where: str) -> str:
    if value in choices:
        return typing.cast(str, value)
    near = nearest_name(str(value), choices)
    hint = f" (did you mean {near}?)" if near else ""
    raise bad_value(where, value, "is not a choice", f"choose {' or '.join(choices)}{hint}")


def _from_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise bad_value(
            where,
            text,
            f"is not JSON ({error.msg} at character {error.pos})",
            "write JSON, between '...' in a shell",
        ) from None


def _is_plain_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _to_tuple(item: Any, value: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, str):
        is_list = value.lstrip().startswith(("[", "{")) or dataclasses.is_dataclass(item)
        value = _from_json(value, where) if is_list else value.split(",")
    if not isinstance(value, (list, tuple)):
        raise bad_value(where, value, "is not a list", "write a list")
    return tuple(_coerce(item, entry, f"{where}[{i}]") for i, entry in enumerate(value))


def _to_record(cls: type, value: Any, where: str) -> Any:
    """Build a small dataclass (an entry of a list) from a mapping."""
    if isinstance(value, cls):
        return value
    table = option_fields(cls)
    required = [name for name, o in table.items() if o.default is dataclasses.MISSING]
    if not _is_plain_mapping(value):
        raise bad_value(where, value, "is not a mapping", f"write {{{', '.join(table)}}}")
    for key in value:
        if key not in table:
            raise bad_value(where, key, "is not a known key", f"use {', '.join(table)}")
    for key in required:
        if key not in value:
            raise bad_value(where, dict(value), f"lacks {key}", f"add {key}")
    return cls(**{key: coerce(table[key], v, f"{where}.{key}") for key, v in value.items()})


def unknown_name(where: str, name: str, known: typing.Iterable[str], what: str) -> UserError:
    """The error for a name that no option has, with the nearest one that exists."""
    near = nearest_name(name, known)
    remedy = f"did you mean {near}?" if near else "see --help for the names that exist"
    return bad_value(where, name, f"is not a known {what}", remedy)


def build(
    cls: type[T],
    values: Mapping[str, Any],
    source: str = "configuration",
    lines: Mapping[str, int] | None = None,
) -> T:
    """Build an options object from a flat mapping of plain values.

    Args:
        cls: The options class.
        values: Flat names (dashes or underscores) to plain values; the others keep their default.
        source: What the mapping was read from, for errors.
        lines: Line number of each key in the source, for errors.

    Raises:
        UserError: An unknown name, or a value of the wrong type.
    """
    table = {n: o for n, o in option_fields(cls).items() if n not in INVOCATION_FIELDS}
    groups: dict[str | None, dict[str, Any]] = {}
    for key, value in values.items():
        place = f"{source}:{lines[key]}" if lines and key in lines else source
        name = str(key).replace("-", "_")
        if name not in table:
            raise unknown_name(place, str(key), table, "key")
        option = table[name]
        groups.setdefault(option.group, {})[name] = coerce(option, value, f"{place}: {name}")
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = dict(groups.pop(None, {}))
    for group, members in groups.items():
        arguments[typing.cast(str, group)] = hints[typing.cast(str, group)](**members)
    return cls(**arguments)


def flatten(config: Any) -> dict[str, Any]:
    """Flat mapping of plain values (lists and dictionaries instead of tuples and dataclasses)."""
    values = {}
    for name, option in option_fields(type(config)).items():
        if name not in INVOCATION_FIELDS:
            owner = getattr(config, option.group) if option.group else config
            values[name] = plain_value(getattr(owner, name))
    return values


def plain_value(value: Any) -> Any:
    """A value as JSON and YAML know it; entries of a small dataclass that are None are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: plain_value(entry) for name, entry in entries if entry is not None}
    if isinstance(value, (tuple, list)):
        return [plain_value(entry) for entry in value]
    return dict(value) if isinstance(value, dict) else value


def dump_yaml(config: Any) -> str:
    """YAML text with one comment line a group; reading it back gives an equal object."""
    values = flatten(config)
    hints = typing.get_type_hints(type(config))
    groups: dict[str | None, dict[str, Any]] = {}
    for name, option in option_fields(type(config)).items():
        if name in values:
            groups.setdefault(option.group, {})[name] = values[name]
    parts = []
    for group, members in groups.items():
        # Non-ASCII text is escaped: PyYAML would write line separators that it reads as spaces.
        text = yaml.safe_dump(members, sort_keys=False, width=100)
        title = (hints[group].__doc__ or group).splitlines()[0] if group else None
        parts.append(f"# {title}\n{text}" if title else text)
    return "\n".join(parts)
