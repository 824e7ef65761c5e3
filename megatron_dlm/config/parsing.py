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
from types import NoneType
from typing import Any, TypeVar

import yaml

from megatron_dlm.config.coercion import coerce, read_values, unknown_name
from megatron_dlm.config.fields import (
    OptionField,
    flag_of,
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
    return with_values(cls(), values)


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
            errors.append(unknown_name("command line", name, flags, "flag"))
        elif option is None:
            errors.append(
                bad_value("command line", text, "belongs to no flag", "write --flag value")
            )
        elif option.type is bool and equals:
            flag = flag_of(option.name)
            remedy = f"write {flag} or --no-{flag[2:]}"
            errors.append(bad_value(flag, value, "takes no value", remedy))
        elif option.type is not bool and not equals:
            remedy = f"write {name} {_metavar(option)}, or {name}=... if it begins with a dash"
            errors.append(bad_value(name, None, "has no value", remedy))
        else:
            given[option.name] = name == flag_of(option.name) if option.type is bool else value
    return given, asks_help, errors[0] if errors else None


def format_length(config: Config) -> str:
    """The length of a run as a YAML comment, from a configuration `of_data`."""
    batch, samples, rollouts = config.rollout_batch_size, config.num_samples, config.num_rollouts
    what = "rollouts" if config.uses_rollouts else "updates"
    last = samples - (rollouts - 1) * batch
    short = f", the last of {last}" if last < batch else ""
    updates = f": {config.train_iters} updates" if config.uses_rollouts else ""
    records = config.num_records
    return f"# {records} records; {samples} samples in {rollouts} {what} of {batch}{short}{updates}"


def _help(cls: type, values: Mapping[str, Any], **texts: str | None) -> str:
    """The help text, with the values of a file as defaults."""
    usage = "%(prog)s [-h] [OPTIONS]"
    parser = argparse.ArgumentParser(usage=usage, add_help=False, **texts)  # type: ignore[arg-type]
    hints, helps = typing.get_type_hints(cls), option_helps(cls)
    group = parser.add_argument_group("options")
    group.add_argument("-h", "--help", action="store_true", help="Show this text.")
    places: dict[str | None, Any] = {None: group}
    for name, option in option_fields(cls).items():
        if option.group is not None and option.group not in places:
            heading = (hints[option.group].__doc__ or "").splitlines()[0]
            title = f"{option.group.replace('_', ' ')} options"
            places[option.group] = parser.add_argument_group(title, heading)
        value, text = values.get(name, option.default), helps[name]
        # What follows from other options where it is none is part of the text.
        notes = [] if value is None and "(default: " in text else [f"default: {_shown(value)}"]
        notes += [str(option.range)] if option.range else []
        text = text + (f" ({'; '.join(notes)})" if notes else "")
        switch = {"action": argparse.BooleanOptionalAction}
        kind: Any = switch if option.type is bool else {"metavar": _metavar(option)}
        places[option.group].add_argument(
            flag_of(name), dest=name, help=text.replace("%", "%%"), **kind
        )
    return parser.format_help().removesuffix("\n")


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


BASE_KEY = "base"
"""Key of a YAML file with the relative path of another one, whose keys it changes or adds to; that
file must not have a base itself."""


def _load_yaml(cls: type, path: str, field: str = "--config") -> dict[str, Any]:
    """The values of a flat YAML file that `field` names, over those of the file's base.

    Raises:
        UserError: A file is missing or broken, or has an unknown, repeated or ill-typed key, or the
            base has a base.
    """
    keys, lines = _read_yaml(path, field)
    if BASE_KEY not in keys:
        return read_values(cls, keys, path, lines)
    if field != "--config":
        raise bad_value(field, path, "has a base of its own", "name that one, and add its keys")
    named, place = keys.pop(BASE_KEY), f"{path}:{lines[BASE_KEY]}: {BASE_KEY}"
    if not isinstance(named, str) or not named:
        raise bad_value(place, named, "has the wrong type", "write the path of a YAML file")
    base = _load_yaml(cls, str(Path(path).parent / named), place)
    return base | read_values(cls, keys, path, lines)


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
