"""The flat view of a nested options class: its fields, and the plain values of an object.

Command line, YAML and checkpoints all use the same flat names. Works for any frozen dataclass whose
fields are options or groups (nested dataclasses) of options; commands have such classes of their
own.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, Union

import docstring_parser
import yaml

from megatron_dlm.config.marks import FIXED
from megatron_dlm.ranges import Range

T = TypeVar("T")

INVOCATION_FIELDS = frozenset({"config", "dry_run", "resume", "extend", "records"})
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

    @property
    def flag(self) -> str:
        """The command-line flag."""
        return flag_of(self.name)


def flag_of(name: str) -> str:
    """The command-line flag of an option."""
    return "--" + name.replace("_", "-")


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
    """Help text of each option by flat name, on one line: its docstring, or its metadata's help."""
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
    return _option_fields(cls)  # type checkers do not accept a generic class as hashable


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


def construct(cls: type[T], values: Mapping[str, Any]) -> T:
    """An options object from values by flat name, of the options' types; the others by default."""
    table, hints = option_fields(cls), typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        group = table[name].group
        owner = arguments if group is None else arguments.setdefault(group, {})
        owner[name] = value
    groups = {o.group for o in table.values() if o.group is not None}
    return cls(**{n: hints[n](**v) if n in groups else v for n, v in arguments.items()})


def flatten(config: Any) -> dict[str, Any]:
    """Flat mapping of plain values (lists and dictionaries instead of tuples and dataclasses)."""
    values = {}
    for name, option in option_fields(type(config)).items():
        if name not in INVOCATION_FIELDS:
            owner = getattr(config, option.group) if option.group else config
            values[name] = plain_value(getattr(owner, name))
    return values


def plain_value(value: Any) -> Any:
    """A value of JSON and YAML types; entries of a small dataclass that are None are left out."""
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
        # Non-ASCII text is escaped: PyYAML writes line separators that it then reads as spaces.
        text = yaml.safe_dump(members, sort_keys=False, width=100)
        title = (hints[group].__doc__ or group).splitlines()[0] if group else None
        parts.append(f"# {title}\n{text}" if title else text)
    return "\n".join(parts)
