"""The flat view of a nested options class, whose names flags, YAML and checkpoints have in common.

Such a class is a frozen dataclass of options and groups (dataclasses) of options.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, TypeVar

import docstring_parser

from megatron_dlm.ranges import Range

T = TypeVar("T")

FIXED = "fixed on resume"
"""Mark of an option that a resumed run cannot change: it would be a different run."""
NOT_AN_OPTION = "not an option"
"""Mark of a field that is not read from the command line or YAML."""
INVOCATION_FIELDS = frozenset({"config", "dry_run", "resume", "extend"})
"""Fields of one invocation, never written to YAML or read from it."""


@dataclasses.dataclass(frozen=True)
class OptionField:
    """One option: its place and the values it accepts."""

    name: str  # unique over all groups
    group: str | None  # that holds it; None: the class itself
    type: Any  # resolved type annotation, without `| None`
    optional: bool  # whether None is allowed
    default: Any  # `dataclasses.MISSING`: it has to be given
    range: Range | None  # numbers that it, or every entry of a mapping, may be; None: any
    fixed_on_resume: bool  # whether a resumed run cannot change it


def flag_of(name: str) -> str:
    """The command-line flag of an option."""
    return "--" + name.replace("_", "-")


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
        kind = hints[name].__origin__ if marks else hints[name]
        if dataclasses.is_dataclass(kind):
            options = [dataclasses.replace(o, group=name) for o in option_fields(kind).values()]
        else:
            first, *others = typing.get_args(kind) or (kind,)
            optional = NoneType in others
            lazy = field.default_factory is not dataclasses.MISSING
            default = field.default_factory() if lazy else field.default  # type: ignore[operator]
            bounds = next((mark for mark in marks if isinstance(mark, Range)), None)
            kind = first if optional else kind
            options = [OptionField(name, None, kind, optional, default, bounds, FIXED in marks)]
        for option in options if NOT_AN_OPTION not in marks else ():
            if option.name in table:
                raise TypeError(f"{cls.__name__} declares {option.name} twice")
            table[option.name] = option
    return table


option_fields: Callable[[Any], dict[str, OptionField]] = functools.cache(_option_fields)


def with_values(options: T, values: Mapping[str, Any]) -> T:
    """The same options with other values of some, by flat name, of their options' types."""
    groups: dict[str | None, dict[str, Any]] = {None: {}}
    for name, value in values.items():
        groups.setdefault(option_fields(type(options))[name].group, {})[name] = value
    changed = groups.pop(None)
    for group, members in groups.items():
        changed[str(group)] = dataclasses.replace(getattr(options, str(group)), **members)
    return dataclasses.replace(options, **changed)  # type: ignore[type-var]


def value_of(options: Any, name: str) -> Any:
    """The value of an option by its flat name."""
    group = option_fields(type(options))[name].group
    return getattr(getattr(options, group) if group else options, name)


def plain_value(value: Any) -> Any:
    """A value of JSON and YAML types; entries of a small dataclass that are None are left out."""
    if isinstance(value, (tuple, list)):
        return [plain_value(entry) for entry in value]
    if dataclasses.is_dataclass(value):
        return {name: entry for name, entry in vars(value).items() if entry is not None}
    return value
