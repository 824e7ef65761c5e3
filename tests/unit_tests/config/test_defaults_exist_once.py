"""A default of an option is written beside its field and nowhere else."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_dlm.config import Config
from megatron_dlm.config.fields import option_fields
from tests.tiny import REPOSITORY

EVERYDAY = (None, True, False, 0, 1, "", ())
"""Values that say nothing about where they come from."""
FOLDERS = ("megatron_dlm", "benchmarks", "examples", "tools")
APART = (
    Path("megatron_dlm/config"),
    Path("megatron_dlm/types"),
    Path("megatron_dlm/conversion/remote_code"),
)
"""Where defaults of options stand or come from, and code that works without this package."""


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _defaults(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Names with their defaults: of parameters, of fields, and of keys that may be missing."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(args=of) | ast.AsyncFunctionDef(args=of):
                by_position = [*of.posonlyargs, *of.args]
                given = by_position[len(by_position) - len(of.defaults) :]
                yield from ((a.arg, d) for a, d in zip(given, of.defaults, strict=True))
                of_keywords = zip(of.kwonlyargs, of.kw_defaults, strict=True)
                yield from ((a.arg, d) for a, d in of_keywords if d is not None)
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                yield name, value
            case ast.Call(func=ast.Attribute(attr="get"), args=[key, default]):
                yield str(_literal(key)), default


def test_defaults_exist_once() -> None:
    options = {name: option.default for name, option in option_fields(Config).items()}
    repeated = [
        f"{file}: {name} = {options[name]!r}"
        for folder in FOLDERS
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
        if not any((file := path.relative_to(REPOSITORY)).is_relative_to(a) for a in APART)
        for name, node in _defaults(ast.parse(path.read_text(encoding="utf-8")))
        if name in options and options[name] not in EVERYDAY and _literal(node) == options[name]
    ]
    assert repeated == []
