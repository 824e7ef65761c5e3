"""Write docs/configuration.md, the table of all options, from the options' own docstrings.

python docs/generate_configuration.py
"""

import dataclasses
import json
import typing
from pathlib import Path

from megatron_dlm.config import Config
from megatron_dlm.config.fields import (
    INVOCATION_FIELDS,
    OptionField,
    option_fields,
    option_helps,
    plain_value,
)
from megatron_dlm.output_file import write_file

PAGE = Path(__file__).with_name("configuration.md")

HEAD = """\
# Configuration

Written by `docs/generate_configuration.py` from `megatron_dlm/config/`; do not edit.

Every option has one name. `tensor_model_parallel_size` is a key of a flat YAML file, and
`--tensor-model-parallel-size` a flag; an option that is true or false is switched by `--bf16` and
`--no-bf16`. Lists and mappings are JSON on the command line; `none` clears an option that may be
none. Flags win over the file that `--config` names, which wins over the defaults. A key `base` of
that file names another one, relative to it, whose keys it changes or adds to: one level, a mapping
or list as a whole, and `--dry-run` prints what results. A name that does
not exist, a value of the wrong type, values that cannot work together and an option that the run
has no use for, unless it has its default, are errors, in one line, with exit status 2. What is
`fixed` cannot be changed when a run is resumed.

`--dry-run` reads, checks and prints the configuration, prompts and model description included, and
stops. It checks a layout without starting its processes when `WORLD_SIZE` says how many there are:
`WORLD_SIZE=8 python pretrain_opdlm.py --config ... --dry-run`.
"""


def type_name(annotation: typing.Any) -> str:
    """How the table shows what an option accepts."""
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{choice}`" for choice in typing.get_args(annotation))
    if origin is dict:
        return "mapping"
    if origin is tuple:
        return "list"
    return {bool: "true or false", int: "integer", float: "number", str: "text"}[annotation]


def default_text(option: OptionField) -> str:
    """The default as YAML and JSON write it."""
    if option.default is None:
        return "none"
    value = plain_value(option.default)
    if isinstance(value, str):
        return f"`{value}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{json.dumps(value)}`"


def group_class(name: str) -> type:
    """The dataclass of a group of options."""
    group: type = typing.get_type_hints(Config)[name]
    return group


def table(options: list[OptionField], helps: dict[str, str]) -> list[str]:
    """Markdown rows of some options."""
    rows = ["| key | value | default | resumed | meaning |", "|---|---|---|---|---|"]
    for option in options:
        accepts = type_name(option.type)
        if option.range is not None:
            accepts += f", {option.range}"
        resumed = "fixed" if option.fixed_on_resume else ""
        meaning = helps[option.name].replace("|", "\\|")
        cells = (f"`{option.name}`", accepts, default_text(option), resumed, meaning)
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def configuration_page() -> str:
    """The text of docs/configuration.md."""
    helps = option_helps(Config)
    by_group: dict[str | None, list[OptionField]] = {}
    for option in option_fields(Config).values():
        by_group.setdefault(option.group, []).append(option)
    lines = [HEAD]
    for field in dataclasses.fields(Config):
        if field.name not in by_group:
            continue
        owner = group_class(field.name)
        title, _, about = (owner.__doc__ or "").splitlines()[0].partition(": ")
        lines += [f"## {title}", "", about[:1].upper() + about[1:], ""]
        lines += [*table(by_group[field.name], helps), ""]
    lines += ["## Invocation", "", "Flags only: they are about one start of the program.", ""]
    invocation = [option for option in by_group[None] if option.name in INVOCATION_FIELDS]
    lines += table(invocation, helps)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    write_file(PAGE, configuration_page())
