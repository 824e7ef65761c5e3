"""Command line and YAML into an options object.

tyro makes the parser and the help text from the dataclasses; it is asked for raw strings, which
`fields.coerce` then reads, so that flags and YAML share one meaning and one kind of error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from megatron_dlm.config.fields import (
    OptionField,
    build,
    coerce,
    dump_yaml,
    option_fields,
    option_helps,
    plain_value,
    unknown_name,
)
from megatron_dlm.config.schema import Config
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.regular_file import read_regular

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class _Given:
    """A string of the command line, not yet read as its field's type."""

    text: str


def parse_config(argv: list[str] | None = None) -> Config:
    """Read the configuration of a training run; nothing is validated across fields yet.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Raises:
        UserError: An unknown flag or key, a value of the wrong type, an unreadable YAML file.
        SystemExit: After printing `--help` (status 0).
    """
    return parse_arguments(Config, argv)


def parse_arguments(
    cls: type[T],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    prog: str | None = None,
) -> T:
    """Read any options class from the command line, over the YAML file of its `config` field.

    Args:
        cls: A frozen dataclass of options and groups of options, every field with a default.
        argv: Arguments without the program's name; None takes those of the process.
        description: First lines of the help text.
        prog: Name of the program in the help text (default: the script's).

    Raises:
        UserError: An unknown flag or key, a value of the wrong type, an unreadable YAML file.
        SystemExit: After printing `--help` (status 0), which only rank 0 prints.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    table = option_fields(cls)
    path = _config_path(arguments) if "config" in table else None
    defaults = cls() if path is None else _load_yaml(cls, path)
    if _wants_help(arguments):
        _join_help_lines(cls)
    else:
        _check_flags(arguments, table)
    try:
        parsed, unknown = tyro.cli(
            cls,
            prog=prog,
            description=description,
            args=arguments,
            default=defaults,
            return_unknown_args=True,
            # torchrun starts every rank with the same arguments: one of them answers --help.
            console_outputs=_wants_help(arguments) and os.environ.get("RANK", "0") == "0",
            config=(tyro.conf.OmitArgPrefixes,),
            registry=_raw_string_registry(),
        )
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
        text = " ".join(arguments)
        raise bad_value("command line", text, "cannot be read", "see --help") from None
    if unknown:
        raise _unknown_argument(unknown[0], table)
    return _read_given(parsed, table)


def format_config(config: Any) -> str:
    """Readable text of a configuration: YAML in groups that `--config` reads back."""
    return dump_yaml(config)


def format_length(config: Config) -> str:
    """How long a run is, of a configuration `of_data`, as a comment in YAML."""
    batch, samples, rollouts = config.rollout_batch_size, config.num_samples, config.num_rollouts
    what = "rollouts" if config.uses_rollouts else "updates"
    last = samples - (rollouts - 1) * batch
    short = f", the last of {last}" if last < batch else ""
    updates = f": {config.train_iters} updates" if config.uses_rollouts else ""
    records = config.num_records
    return f"# {records} records; {samples} samples in {rollouts} {what} of {batch}{short}{updates}"


def _wants_help(arguments: Sequence[str]) -> bool:
    return any(argument in ("-h", "--help") for argument in arguments)


def _join_help_lines(cls: type) -> None:
    """Give tyro the fields' docstrings as paragraphs: it keeps their line breaks otherwise."""
    helps = option_helps(cls)
    for field in dataclasses.fields(cls):
        nested = typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(nested):
            _join_help_lines(typing.cast(type, nested))
        elif field.name in helps:
            field.metadata = types.MappingProxyType({"help": helps[field.name]})


def _raw_string_registry() -> tyro.constructors.ConstructorRegistry:
    """Rules under which tyro keeps the string of every option that is not a switch."""
    registry = tyro.constructors.ConstructorRegistry()

    def rule(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
        if info.type is bool or dataclasses.is_dataclass(info.type):
            return None  # tyro's own: a pair of flags, a group of options
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=_metavar(info.type),
            instance_from_str=lambda strings: _Given(strings[0]),
            is_instance=lambda value: True,
            str_from_instance=lambda value: [_shown(value)],
        )

    registry.primitive_rule(rule)
    return registry


def _metavar(annotation: Any) -> str:
    """What `--help` shows as the value of a flag."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return "|".join(
            "none" if member is type(None) else _metavar(member)
            for member in typing.get_args(annotation)
        )
    if typing.get_origin(annotation) is typing.Literal:
        return "{" + ",".join(typing.get_args(annotation)) + "}"
    if typing.get_origin(annotation) in (dict, tuple):
        return "JSON"
    return str(getattr(annotation, "__name__", annotation)).upper()


def _shown(value: Any) -> str:
    """What `--help` shows as a default."""
    if value is None:
        return "none"
    plain = plain_value(value)
    return json.dumps(plain) if isinstance(plain, (list, dict)) else str(plain)


def _config_path(arguments: Sequence[str]) -> str | None:
    """The value of the last `--config`, which has to be known before the other flags."""
    path = None
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            path = arguments[i + 1]
        elif argument.startswith("--config="):
            path = argument.partition("=")[2]
    return path


def _option_of_flag(flag: str, table: dict[str, OptionField]) -> OptionField | None:
    """The option of `--flag`, or of `--no-flag` for a switch."""
    if not flag.startswith("--"):
        return None
    name = flag[2:].replace("-", "_")
    if name in table:
        return table[name]
    option = table.get(name.removeprefix("no_"))
    return option if option is not None and option.type is bool else None


def _check_flags(arguments: Sequence[str], table: dict[str, OptionField]) -> None:
    """Refuse a switch with a value, and any other flag without one.

    Raises:
        UserError: Naming the flag.
    """
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        option = _option_of_flag(flag, table)
        if option is None:
            continue
        following = arguments[i + 1] if i + 1 < len(arguments) else None
        if option.type is bool:
            if equals or (following is not None and not following.startswith("--")):
                negative = "--no-" + option.flag[2:]
                given = value if equals else following
                remedy = f"write {option.flag} or {negative}"
                raise bad_value(option.flag, given, "takes no value", remedy)
        elif not equals and (following is None or following.startswith("--")):
            remedy = f"write {option.flag} {_metavar(option.type)}"
            raise bad_value(option.flag, following, "has no value", remedy)


def _unknown_argument(token: str, table: dict[str, OptionField]) -> UserError:
    """The error for a token that tyro could not use."""
    if not token.startswith("--"):
        return bad_value("command line", token, "belongs to no flag", "write --flag value")
    negatives = ["--no-" + o.flag[2:] for o in table.values() if o.type is bool]
    flags = [*(option.flag for option in table.values()), *negatives]
    return unknown_name("command line", token.partition("=")[0], flags, "flag")


def _read_given(parsed: T, table: dict[str, OptionField]) -> T:
    """Replace the strings of the command line by values of their fields' types."""

    def read(owner: Any) -> Any:
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(owner):
            value = getattr(owner, field.name)
            if isinstance(value, _Given):
                option = table[field.name]
                changes[field.name] = coerce(option, value.text, option.flag)
            elif dataclasses.is_dataclass(value):
                changes[field.name] = read(value)
        return dataclasses.replace(owner, **changes)

    return typing.cast(T, read(parsed))


BASE_KEY = "base"
"""Key of a YAML file that names another one, relative to itself, whose keys it changes or adds to.
One level: a file that has a base is none."""


def _load_yaml(cls: type[T], path: str) -> T:
    """Read an options object from a flat YAML file, over the one that it names as its base.

    Raises:
        UserError: A file is missing or broken, or has an unknown, repeated or ill-typed key, or the
            base has a base.
    """
    values, lines = _read_yaml(path, "--config")
    if BASE_KEY not in values:
        return build(cls, values, path, lines)
    named, place = values.pop(BASE_KEY), f"{path}:{lines[BASE_KEY]}: {BASE_KEY}"
    if not isinstance(named, str) or not named:
        raise bad_value(place, named, "has the wrong type", "write the path of a YAML file")
    base = str(Path(path).parent / named)
    base_values, base_lines = _read_yaml(base, place)
    if BASE_KEY in base_values:
        raise bad_value(place, named, "has a base of its own", "name that one, and add its keys")
    build(cls, base_values, base, base_lines)  # what is wrong in it is said of its lines
    changed = {key.replace("-", "_") for key in values}
    kept = {k: value for k, value in base_values.items() if k.replace("-", "_") not in changed}
    return build(cls, {**kept, **values}, path, lines)


def _read_yaml(path: str, field: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Keys with values and keys with lines of a flat YAML file that `field` names.

    Raises:
        UserError: The file is missing or broken, or has a repeated key.
    """
    try:
        text = read_regular(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise bad_value(
            field, path, f"cannot be read ({reason})", "give the path of a YAML file"
        ) from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        problem = getattr(error, "problem", None) or "broken syntax"
        raise bad_value(field, place, f"is not YAML ({problem})", "correct that line") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        reason = "is nested too deeply" if isinstance(error, RecursionError) else f"has {error}"
        raise bad_value(field, path, reason, "write one `key: value` a line") from None
    if node is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        raise bad_value(
            field, path, "is not a mapping of keys to values", "write one `key: value` a line"
        )
    lines: dict[str, int] = {}
    for key, _ in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name.replace("-", "_") in {known.replace("-", "_") for known in lines}:
            raise bad_value(f"{path}:{line}", name, "is given twice", "keep one of the two")
        lines[name] = line
    return {str(key): value for key, value in values.items()}, lines
