"""The flat view of a nested options class: its fields, and the plain values of an object.

Command line, YAML and checkpoints all use the same flat names. Works for any frozen dataclass whose
fields are options or groups (nested dataclasses) of options; commands have such classes of their
own.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, Union

import docstring_parser

from megatron_dlm.config.marks import FIXED, NOT_AN_OPTION
from megatron_dlm.ranges import Range

T = TypeVar("T")

INVOCATION_FIELDS = frozenset({"config", "dry_run", "resume", "extend"})
"""Fields of one invocation, never written to YAML or read from it."""


@dataclasses.dataclass(frozen=True)
class OptionField:
    """One option: its place and the values it accepts.

    Attributes:
        name: Field name, unique over all groups.
        group: Name of the group that holds it; None for a field of the class itself.
        type: Resolved type annotation, without `| None`.
        optional: Whether None is allowed.
        default: Value when nobody gives one.
        range: Numbers that it, or every entry of a mapping, may be; None: any.
        fixed_on_resume: Whether a resumed run cannot change it.
    """

    name: str
    group: str | None
    type: Any
    optional: bool
    default: Any
    range: Range | None
    fixed_on_resume: bool


def flag_of(name: str) -> str:
    """The command-line flag of an option."""
    return "--" + name.replace("_", "-")


def split_optional(annotation: Any) -> tuple[Any, bool]:
    """Separate `X | None` into (X, True); any other annotation is (annotation, False)."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        members = [a for a in typing.get_args(annotation) if a is not type(None)]
        if len(members) != 1:
            raise TypeError(f"an option can have one type or one type and None: {annotation}")
        return members[0], True
    return annotation, False


def option_helps(cls: Any) -> dict[str, str]:
    """Help text of each option by flat name, on one line: its docstring, or its metadata's help."""
    helps: dict[str, str] = {}
    for field in dataclasses.fields(cls):
        kind = typing.get_type_hints(cls)[field.name]
        own = {field.name: field.metadata.get("help", "")}
        helps |= option_helps(kind) if dataclasses.is_dataclass(kind) else own
    for base in reversed(cls.__mro__):
        # A field's docstring is in the class that declares it.
        if base.__module__ != "types" and dataclasses.is_dataclass(base):
            for param in docstring_parser.parse_from_object(base).params:
                helps[param.arg_name] = " ".join((param.description or "").split())
    return helps


def _option_fields(cls: Any) -> dict[str, OptionField]:
    """All options of a class by flat name, groups opened, in the order of declaration.

    Raises:
        TypeError: Two groups declare the same name (a defect of the class, not of user input).
    """
    table: dict[str, OptionField] = {}
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        name, marks = field.name, getattr(hints[field.name], "__metadata__", ())
        kind, optional = split_optional(hints[name].__origin__ if marks else hints[name])
        options = {}
        if dataclasses.is_dataclass(kind):
            members = option_fields(kind).items()
            options = {n: dataclasses.replace(option, group=name) for n, option in members}
        elif NOT_AN_OPTION not in marks:
            lazy = field.default_factory is not dataclasses.MISSING
            default = field.default_factory() if lazy else field.default  # type: ignore[operator]
            bounds = next((mark for mark in marks if isinstance(mark, Range)), None)
            option = OptionField(name, None, kind, optional, default, bounds, FIXED in marks)
            options = {name: option}
        if repeated := table.keys() & options:
            raise TypeError(f"{cls.__name__} declares {', '.join(repeated)} twice")
        table |= options
    return table


option_fields: Callable[[Any], dict[str, OptionField]] = functools.cache(_option_fields)


def with_values(options: T, values: Mapping[str, Any]) -> T:
    """The same options with other values of some, by flat name, of their options' types."""
    table, groups = option_fields(type(options)), dict[str | None, dict[str, Any]]()
    for name, value in values.items():
        groups.setdefault(table[name].group, {})[name] = value
    changed = groups.pop(None, {})
    for group, members in groups.items():
        changed[str(group)] = dataclasses.replace(getattr(options, str(group)), **members)
    return dataclasses.replace(options, **changed)  # type: ignore[type-var]


def value_of(options: Any, name: str) -> Any:
    """The value of an option by its flat name."""
    group = option_fields(type(options))[name].group
    return getattr(getattr(options, group) if group else options, name)


def plain_value(value: Any) -> Any:
    """A value of JSON and YAML types; entries of a small dataclass that are None are left out."""
    if isinstance(value, tuple):
        return [plain_value(entry) for entry in value]
    if dataclasses.is_dataclass(value):
        return {name: entry for name, entry in vars(value).items() if entry is not None}
    return value
