"""Command line and YAML into an options object.

argparse finds flags and values; `coercion` reads the values, as it reads those of YAML.
"""

import argparse
import json
import os
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import yaml

from megatron_dlm.config.coercion import coerce, read_values, unknown_name
from megatron_dlm.config.fields import (
    OptionField,
    option_fields,
    option_helps,
    plain_value,
    with_values,
)
from megatron_dlm.config.schema import Config
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.regular_file import read_regular
from megatron_dlm.terminal import say

T = TypeVar("T")


def parse_config(argv: list[str] | None = None) -> Config:
    """Read the configuration of a training run; nothing is validated across fields yet.

    See `parse_arguments`.
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
    table, name = option_fields(cls), re.compile(r"^--[\w-]+(?==|$)")
    arguments = sys.argv[1:] if argv is None else argv
    # Underscores in a flag's name are as good as dashes.
    given = [name.sub(lambda flag: flag[0].replace("_", "-"), text) for text in arguments]
    try:
        parsed, unknown = _parser(cls).parse_known_args(given)
    except argparse.ArgumentError as error:
        raise _misused_flag(error, given, table) from None
    texts = vars(parsed)
    path = coerce(table["config"], texts["config"], "--config") if "config" in texts else None
    values = {} if path is None else _load_yaml(cls, path)
    if texts.pop("help", False):
        # torchrun starts every rank with the same arguments: one of them answers.
        if os.environ.get("RANK", "0") == "0":
            parser = _parser(cls, values, prog=prog, description=description)
            say(parser.format_help().removesuffix("\n"))
        raise SystemExit(0)
    if unknown:
        raise _unknown_argument(unknown[0], given, table)
    values |= {name: coerce(table[name], text, table[name].flag) for name, text in texts.items()}
    return with_values(cls(), values)


def format_length(config: Config) -> str:
    """The length of a run as a YAML comment, from a configuration `of_data`."""
    batch, samples, rollouts = config.rollout_batch_size, config.num_samples, config.num_rollouts
    what = "rollouts" if config.uses_rollouts else "updates"
    last = samples - (rollouts - 1) * batch
    short = f", the last of {last}" if last < batch else ""
    updates = f": {config.train_iters} updates" if config.uses_rollouts else ""
    records = config.num_records
    return f"# {records} records; {samples} samples in {rollouts} {what} of {batch}{short}{updates}"


def _parser(
    cls: type, values: Mapping[str, Any] | None = None, **texts: str | None
) -> argparse.ArgumentParser:
    """A parser that keeps what is given as text; with `values` it has a help text of them."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [-h] [OPTIONS]",
        argument_default=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
        **texts,  # type: ignore[arg-type]
    )
    hints, helps = typing.get_type_hints(cls), {} if values is None else option_helps(cls)
    group = parser.add_argument_group("options")
    group.add_argument("-h", "--help", action="store_true", help="Show this text.")
    places: dict[str | None, Any] = {None: group}
    for name, option in option_fields(cls).items():
        if option.group is not None and option.group not in places:
            heading = (hints[option.group].__doc__ or "").splitlines()[0]
            title = f"{option.group.replace('_', ' ')} options"
            places[option.group] = parser.add_argument_group(title, heading)
        value, text = (values or {}).get(name, option.default), helps.get(name, "")
        # What follows from other options where it is none is part of the text.
        notes = [] if value is None and "(default: " in text else [f"default: {_shown(value)}"]
        notes += [str(option.range)] if option.range else []
        text = text + (f" ({'; '.join(notes)})" if notes else "")
        switch = {"action": argparse.BooleanOptionalAction}
        kind: Any = switch if option.type is bool else {"metavar": _metavar(option)}
        places[option.group].add_argument(
            option.flag, dest=name, help=text.replace("%", "%%"), **kind
        )
    return parser


def _metavar(option: OptionField) -> str:
    """What `--help` shows as the value of a flag."""
    origin = typing.get_origin(option.type)
    if origin is typing.Literal:
        text = "{" + ",".join(typing.get_args(option.type)) + "}"
    else:
        text = "JSON" if origin in (dict, tuple) else str(option.type.__name__).upper()
    return f"{text}|none" if option.optional else text


def _shown(value: Any) -> str:
    """What `--help` shows as a default."""
    plain = "none" if value is None else plain_value(value)
    return json.dumps(plain) if isinstance(plain, (list, dict)) else str(plain)


def _misused_flag(
    error: argparse.ArgumentError, given: Sequence[str], table: Mapping[str, OptionField]
) -> UserError:
    """The error for a switch with a value, or any other flag without one."""
    flag = (error.argument_name or "").split("/")[0]
    option = next((option for option in table.values() if option.flag == flag), None)
    if option is None:
        return bad_value("command line", " ".join(given), str(error), "see --help")
    if option.type is bool:
        texts = [text for text in given if "=" in text and _switch(text, table) == option]
        return _value_of_switch(option, texts[0].partition("=")[2])
    remedy = f"write {flag} {_metavar(option)}, or {flag}=... if it begins with a dash"
    return bad_value(flag, None, "has no value", remedy)


def _switch(text: str, table: Mapping[str, OptionField]) -> OptionField | None:
    """The option that is true or false which an argument switches."""
    name = text.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
    option = table.get(name) if text.startswith("--") else None
    return option if option is not None and option.type is bool else None


def _value_of_switch(option: OptionField, value: str) -> UserError:
    remedy = f"write {option.flag} or --no-{option.flag[2:]}"
    return bad_value(option.flag, value, "takes no value", remedy)


def _unknown_argument(
    text: str, given: Sequence[str], table: Mapping[str, OptionField]
) -> UserError:
    """The error for an argument that is no flag and no flag's value."""
    if text.startswith("--"):
        flags = [option.flag for option in table.values()]
        flags += [f"--no-{option.flag[2:]}" for option in table.values() if option.type is bool]
        return unknown_name("command line", text.partition("=")[0], flags, "flag")
    if option := _switch(given[max(given.index(text) - 1, 0)], table):
        return _value_of_switch(option, text)
    return bad_value("command line", text, "belongs to no flag", "write --flag value")


BASE_KEY = "base"
"""Key of a YAML file with the relative path of another one, whose keys it changes or adds to; that
file must not have a base itself."""


def _load_yaml(cls: type, path: str) -> dict[str, Any]:
    """The values of a flat YAML file, over those of the one that it names as its base.

    Raises:
        UserError: A file is missing or broken, or has an unknown, repeated or ill-typed key, or the
            base has a base.
    """
    keys, lines = _read_yaml(path, "--config")
    if BASE_KEY not in keys:
        return read_values(cls, keys, path, lines)
    named, place = keys.pop(BASE_KEY), f"{path}:{lines[BASE_KEY]}: {BASE_KEY}"
    if not isinstance(named, str) or not named:
        raise bad_value(place, named, "has the wrong type", "write the path of a YAML file")
    base = str(Path(path).parent / named)
    base_keys, base_lines = _read_yaml(base, place)
    if BASE_KEY in base_keys:
        raise bad_value(place, named, "has a base of its own", "name that one, and add its keys")
    values = read_values(cls, base_keys, base, base_lines)
    return values | read_values(cls, keys, path, lines)


def _read_yaml(path: str, field: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Keys with values and keys with lines of a flat YAML file that `field` names.

    Raises:
        UserError: The file is missing or broken, or has a repeated key.
    """
    place, reason, remedy = path, "", "write one `key: value` a line"
    try:
        text = read_regular(path).decode("utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
        if not isinstance(node, yaml.MappingNode | NoneType):
            reason = "is not a mapping of keys to values"
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        reason, remedy = f"cannot be read ({cause})", "give the path of a YAML file"
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        cause = getattr(error, "problem", None) or "broken syntax"
        reason, remedy = f"is not YAML ({cause})", "correct that line"
    except RecursionError:
        reason = "is nested too deeply"
    except ValueError as error:  # numbers of thousands of digits
        reason = f"has {error}"
    if reason:
        raise bad_value(field, place, reason, remedy)
    lines: dict[str, int] = {}
    for key, _ in node.value if node else ():
        name, line = str(key.value), key.start_mark.line + 1
        if name.replace("-", "_") in {known.replace("-", "_") for known in lines}:
            raise bad_value(f"{path}:{line}", name, "is given twice", "keep one of the two")
        lines[name] = line
    return {str(key): value for key, value in (values or {}).items()}, lines
