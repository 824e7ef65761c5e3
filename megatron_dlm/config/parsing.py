"""Command line and YAML into an options object; `coercion` reads the values of both alike."""

import argparse
import json
import os
import re
import sys
import typing
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megatron_dlm.config import fields
from megatron_dlm.config.coercion import coerce, read_values
from megatron_dlm.config.fields import OptionField, flag_of, option_fields
from megatron_dlm.config.schema import Config
from megatron_dlm.errors import UserError, bad_value, unknown_name
from megatron_dlm.terminal import say
from megatron_dlm.yaml_file import read_yaml_mapping

T = TypeVar("T")


def parse_config(argv: list[str] | None = None) -> Config:
    """Read the configuration of a training run, which is not validated; see `parse_arguments`."""
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
    table = option_fields(cls)
    given, asks_help, wrong = _read_flags(table, sys.argv[1:] if argv is None else argv)
    path = coerce(table["config"], given["config"], "--config") if "config" in given else None
    values = {} if path is None else _load_yaml(cls, path)
    if asks_help:
        # torchrun starts every rank with the same arguments: one of them answers.
        if os.environ.get("RANK", "0") == "0":
            say(_help(cls, values, prog=prog, description=description))
        raise SystemExit(0)
    if wrong is not None:
        raise wrong
    values |= {name: coerce(table[name], value, flag_of(name)) for name, value in given.items()}
    return fields.with_values(cls(), values)


NO_VALUE = re.compile(r"-(?!\d*\.?\d+$)[^ ]+$", re.DOTALL)
"""An argument that cannot be the value of the flag before it: no number, and without spaces."""


def _read_flags(
    table: Mapping[str, OptionField], arguments: Sequence[str]
) -> tuple[dict[str, str | bool], bool, UserError | None]:
    """The options that arguments give, whether they ask for help, and what is wrong with them."""
    flags = {flag_of(name): option for name, option in table.items()}
    flags |= {f"--no-{flag[2:]}": o for flag, o in flags.items() if o.type is bool}
    given: dict[str, str | bool] = {}
    asks_help, errors, left = False, list[UserError](), deque(arguments)
    while left:
        text = left.popleft()
        name, equals, value = text.partition("=")
        # Underscores in a flag's name are as good as dashes.
        option = flags.get(name := name.replace("_", "-"))
        if not equals and option is not None and left and not NO_VALUE.match(left[0]):
            equals, value = " ", left.popleft()
        if name in ("-h", "--help"):
            asks_help = True
        elif option is None and NO_VALUE.match(name):
            errors += [unknown_name("command line", name, flags, "flag")]
        elif option is None:
            errors += [bad_value("command line", text, "belongs to no flag", "write --flag value")]
        elif option.type is bool and equals:
            flag = flag_of(option.name)
            errors += [bad_value(flag, value, "takes no value", f"write {flag} or --no-{flag[2:]}")]
        elif option.type is not bool and not equals:
            remedy = f"write {name} {_metavar(option)}, or {name}=... if it begins with a dash"
            errors += [bad_value(name, None, "has no value", remedy)]
        else:
            given[option.name] = name == flag_of(option.name) if option.type is bool else value
    return given, asks_help, errors[0] if errors else None


def _help(cls: type, values: Mapping[str, Any], **texts: str | None) -> str:
    """The help text, with the values of a file as defaults."""
    usage = "%(prog)s [-h] [OPTIONS]"
    parser = argparse.ArgumentParser(usage=usage, add_help=False, **texts)  # type: ignore[arg-type]
    hints, helps = typing.get_type_hints(cls), fields.option_helps(cls)
    places: dict[str | None, Any] = {None: parser.add_argument_group("options")}
    places[None].add_argument("-h", "--help", action="store_true", help="Show this text.")
    for name, option in option_fields(cls).items():
        if option.group is not None and option.group not in places:
            heading = (hints[option.group].__doc__ or "").splitlines()[0]
            title = f"{option.group.replace('_', ' ')} options"
            places[option.group] = parser.add_argument_group(title, heading)
        value, text = fields.plain_value(values.get(name, option.default)), helps[name]
        shown = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
        # What follows from other options where it is none is part of the text.
        notes = [] if value is None and "(default: " in text else [f"default: {shown}"]
        notes += [str(option.range)] if option.range else []
        text = text + (f" ({'; '.join(notes)})" if notes else "")
        switch = {"action": argparse.BooleanOptionalAction}
        kind: Any = switch if option.type is bool else {"metavar": _metavar(option)}
        text = text.replace("%", "%%")
        places[option.group].add_argument(flag_of(name), dest=name, help=text, **kind)
    return parser.format_help().removesuffix("\n")


def _metavar(option: OptionField) -> str:
    """What `--help` shows as the value of a flag."""
    origin = typing.get_origin(option.type)
    if origin is typing.Literal:
        text = "{" + ",".join(typing.get_args(option.type)) + "}"
    else:
        text = "JSON" if origin in (dict, tuple) else str(option.type.__name__).upper()
    return f"{text}|none" if option.optional else text


def _load_yaml(cls: type, path: str, field: str = "--config") -> dict[str, Any]:
    """The values of a flat YAML file that `field` names, over those of the file's base.

    A key `base` has the relative path of another file, which must not have one itself.
    """
    keys, lines = read_yaml_mapping(path, field, "write one `key: value` a line")
    if "base" not in keys:
        return read_values(cls, keys, path, lines)
    if field != "--config":
        raise bad_value(field, path, "has a base of its own", "name that one, and add its keys")
    named, place = keys.pop("base"), f"{path}:{lines['base']}: base"
    if not isinstance(named, str) or not named:
        raise bad_value(place, named, "has the wrong type", "write the path of a YAML file")
    base = _load_yaml(cls, str(Path(path).parent / named), place)
    return base | read_values(cls, keys, path, lines)
