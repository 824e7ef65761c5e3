"""Puts a module of `remote_code` and all that it imports from this repository into one file.

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
PACKAGE = Path(__file__).parents[1]

LINE_LENGTH = 100

_HEADER = """\
# SPDX-License-Identifier: Apache-2.0
# Put together by megatron-dlm from the modules in its megatron_dlm/conversion/remote_code, and what
# they import of the rest, which are the place to change anything.
"""


@dataclass(frozen=True)
class _Part:
    """One module: its docstring, imports, code behind them and the names this defines."""

    name: str
    docstring: str
    absolute: list[ast.Import | ast.ImportFrom]
    local: list[ast.ImportFrom]
    code: str
    defined: set[str]


def self_contained_code(module: str, kept: str | None = None, source: Path = REMOTE_CODE) -> str:
    """The text of one Python file that does what a module and those that it imports do.

    From the rest of the package it may import modules that follow the same rules, and packages,
    which stand for all modules in them.

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
    """The module and, before it, all that it imports from this repository, each once."""
    found: dict[str, _Part] = {}

    def visit(name: str) -> None:
        folder = PACKAGE.parent / name.replace(".", "/")
        if _is_ours(name) and folder.is_dir():
            for file in sorted(folder.glob("*.py")):
                if file.stem != "__init__":
                    visit(f"{name}.{file.stem}")
        elif name not in found:
            part = _parse(name, source)
            for statement in part.local:
                assert statement.module is not None
                visit(statement.module)
            found[name] = part

    visit(module)
    return list(found.values())


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == PACKAGE.name


def _parse(name: str, source: Path) -> _Part:
    file = PACKAGE.parent / name.replace(".", "/") if _is_ours(name) else source / name
    text = file.with_suffix(".py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    docstring = ast.get_docstring(tree)
    if docstring is None:
        raise ValueError(f"{name} has no docstring")
    statements = tree.body[1:]
    header = [s for s in statements if _import_statements_of(s)]
    imports = [statement for s in header for statement in _import_statements_of(s)]
    code = statements[len(header) :]
    nested = [node for s in code for node in ast.walk(s) if isinstance(node, ast.ImportFrom)]
    if header != statements[: len(header)] or any(node.level for node in nested):
        raise ValueError(f"{name} imports something behind its first definition")
    local = [
        s
        for s in imports
        if isinstance(s, ast.ImportFrom) and (s.level or _is_ours(s.module or ""))
    ]
    for statement in local:
        module = statement.module or ""
        if statement.level > 1 or not module or (statement.level and "." in module):
            raise ValueError(f"{name} imports from more than the modules beside it")
        if any(alias.asname or alias.name == "*" for alias in statement.names):
            raise ValueError(f"{name} renames what it imports from {statement.module}")
    last = header[-1] if header else tree.body[0]
    assert last.end_lineno is not None
    return _Part(
        name,
        docstring,
        [s for s in imports if s not in local],
        local,
        "\n".join(text.splitlines()[last.end_lineno :]).strip("\n"),
        {defined for statement in code for defined in _defined_names(statement)},
    )


def _import_statements_of(statement: ast.stmt) -> list[ast.Import | ast.ImportFrom]:
    """The imports of a statement at the top of a module, those of `if TYPE_CHECKING` included."""
    if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
        return [imported for inner in statement.body for imported in _import_statements_of(inner)]
    return [statement] if isinstance(statement, ast.Import | ast.ImportFrom) else []


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
        for statement in part.absolute:
            names = {ast.unparse(alias) for alias in statement.names}
            if isinstance(statement, ast.Import):
                modules |= names
            elif statement.module != "__future__":
                assert statement.module is not None
                # What is imported for type checkers alone is imported for all.
                members.setdefault(statement.module, set()).update(names - {"TYPE_CHECKING"})
        for statement in part.local:
            if statement.module in elsewhere:
                names = {ast.unparse(alias) for alias in statement.names}
                members.setdefault(f".{elsewhere[statement.module]}", set()).update(names)
    sections: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for name in sorted(modules):
        sections[_import_section(name)].append(f"import {name}")
    for name in sorted(name for name, names in members.items() if names):
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
