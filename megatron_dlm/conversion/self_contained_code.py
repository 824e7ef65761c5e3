"""Puts a module of `remote_code` and all that it imports from beside it into one file.

An exported folder brings one file for the configuration and one for the model: transformers 4
copies the files that a file of remote code imports, but not those that these import in turn. In
this repository the parts stay apart, each written once.
"""

import ast
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REMOTE_CODE = Path(__file__).parent / "remote_code"

LINE_LENGTH = 100

_HEADER = """\
# SPDX-License-Identifier: Apache-2.0
# Put together by megatron-dlm from the modules in its megatron_dlm/conversion/remote_code, which
# are the place to change anything.
"""


@dataclass(frozen=True)
class _Part:
    """One module: its docstring, imports, code behind them and the names this defines."""

    name: str
    docstring: str
    absolute: list[ast.Import | ast.ImportFrom]
    relative: list[ast.ImportFrom]
    code: str
    defined: set[str]


def self_contained_code(module: str, kept: str | None = None, source: Path = REMOTE_CODE) -> str:
    """The text of one Python file that does what a module and those beside it do.

    Args:
        module: Name of the module.
        kept: Name of a module with a file of its own: what it or a module it imports defines is
            imported from that file.
        source: Folder of the modules.

    Raises:
        ValueError: The modules cannot be joined: two define the same name, an import between them
            renames something or is not at the top of its module.
    """
    elsewhere = {} if kept is None else {part.name: kept for part in _closure(kept, source)}
    parts = [part for part in _closure(module, source) if part.name not in elsewhere]
    owners: dict[str, str] = {}
    for part in parts:
        for name in part.defined:
            if owners.setdefault(name, part.name) != part.name:
                raise ValueError(f"{part.name} and {owners[name]} both define {name}")
    main = parts[-1]
    head = f'{_HEADER}"""{main.docstring}"""\n\n{_import_statements(parts, elsewhere)}\n'
    blocks = [f"{_as_comment(part.docstring)}\n\n\n{part.code}" for part in parts[:-1]]
    return head + ("\n" if blocks else "\n\n") + "\n\n\n".join([*blocks, main.code]) + "\n"


def _closure(module: str, source: Path) -> list[_Part]:
    """The module behind all that it imports from beside it, directly or not, each once."""
    found: dict[str, _Part] = {}

    def visit(name: str) -> None:
        if name in found:
            return
        part = _parse(name, source)
        for statement in part.relative:
            assert statement.module is not None
            visit(statement.module)
        found[name] = part

    visit(module)
    return list(found.values())


def _parse(name: str, source: Path) -> _Part:
    text = (source / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    docstring = ast.get_docstring(tree)
    if docstring is None:
        raise ValueError(f"{name} has no docstring")
    statements = tree.body[1:]
    imports = [s for s in statements if isinstance(s, ast.Import | ast.ImportFrom)]
    code = statements[len(imports) :]
    nested = [node for s in code for node in ast.walk(s) if isinstance(node, ast.ImportFrom)]
    if imports != statements[: len(imports)] or any(node.level for node in nested):
        raise ValueError(f"{name} imports something behind its first definition")
    relative = [s for s in imports if isinstance(s, ast.ImportFrom) and s.level]
    for statement in relative:
        if statement.level > 1 or not statement.module or "." in statement.module:
            raise ValueError(f"{name} imports from more than the modules beside it")
        if any(alias.asname or alias.name == "*" for alias in statement.names):
            raise ValueError(f"{name} renames what it imports from {statement.module}")
    last = imports[-1] if imports else tree.body[0]
    assert last.end_lineno is not None
    return _Part(
        name,
        docstring,
        [s for s in imports if s not in relative],
        relative,
        "\n".join(text.splitlines()[last.end_lineno :]).strip("\n"),
        {defined for statement in code for defined in _defined_names(statement)},
    )


def _defined_names(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        yield statement.name
    else:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id


def _import_statements(parts: list[_Part], elsewhere: dict[str, str]) -> str:
    """All imports of the parts, each once, in the order of isort."""
    modules: set[str] = set()
    members: dict[str, set[str]] = {}
    for part in parts:
        for statement in [*part.absolute, *part.relative]:
            names = {ast.unparse(alias) for alias in statement.names}
            if isinstance(statement, ast.Import):
                modules |= names
            elif not statement.level:
                assert statement.module is not None
                members.setdefault(statement.module, set()).update(names)
            elif statement.module in elsewhere:
                members.setdefault(f".{elsewhere[statement.module]}", set()).update(names)
    sections: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for name in sorted(modules):
        sections[_import_section(name)].append(f"import {name}")
    for name in sorted(members):
        sections[_import_section(name)].append(_from_import(name, members[name]))
    return "\n\n".join("\n".join(lines) for lines in sections.values() if lines)


def _import_section(module: str) -> int:
    """The standard library, other packages, the file beside this one."""
    if module.startswith("."):
        return 2
    return 0 if module.split(".")[0] in sys.stdlib_module_names else 1


def _from_import(module: str, names: set[str]) -> str:
    # Constants, classes, functions.
    ordered = sorted(
        names, key=lambda name: (not name.isupper(), not name[0].isupper(), name.lower())
    )
    line = f"from {module} import {', '.join(ordered)}"
    if len(line) <= LINE_LENGTH:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in ordered) + ")"


def _as_comment(docstring: str) -> str:
    lines: list[str] = []
    for paragraph in docstring.split("\n\n"):
        lines += ["#", *(f"# {line}" for line in textwrap.wrap(paragraph, LINE_LENGTH - 2))]
    return "\n".join(lines[1:])
