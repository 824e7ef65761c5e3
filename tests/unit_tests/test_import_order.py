"""Packages import downwards only: no import of any kind goes up this table.

`docs/architecture.md` shows the same order for people.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import megatron_dlm

ROOT = Path(megatron_dlm.__file__).parent

ORDER = (
    ("errors", "object_exchange"),
    ("regular_file", "launcher", "activity", "output_file", "terminal", "megatron_internals"),
    ("json_file", "yaml_file", "entry", "extras", "seeding", "ranges", "api_key"),
    ("platform", "cpu_loops", "rank_watch", "stop_request", "server_requests"),
    ("types", "sandbox", "idle"),
    ("training.manifest", "training.run_folder", "training.run_history"),
    (
        "rollout.decoding_options",
        "rollout.decoding_settings",
        "rollout.pages",
        "rollout.strategies",
    ),
    ("config",),
    ("parallel", "report"),
    ("models", "stop_agreement"),
    ("accounting", "data", "rollout", "distillation"),
    ("conversion",),
    ("teacher", "objectives"),
    (
        "evaluation.evaluator",
        "evaluation.math_processes",
        "evaluation.math_scoring",
        "evaluation.rewards",
        "evaluation.scoring",
        "evaluation.tasks",
    ),
    ("training",),
    ("evaluation", "planning"),
    ("serving",),
    ("commands",),
    ("api",),
)
"""From the bottom up: a row imports from those before it. Packages of one row know nothing of each
other. A module is listed apart from its package where rows in between import it."""

LEVEL = {unit: level for level, row in enumerate(ORDER) for unit in row}


def unit_of(module: str) -> str:
    """The entry of the table that a module (below `megatron_dlm`) belongs to."""
    parts = module.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in LEVEL), module)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module below `megatron_dlm`) of every import, wherever it stands."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, module = name.partition(".")
            if package == megatron_dlm.__name__ and module not in ("", "__version__"):
                yield node.lineno, module


def upward_imports(module: str, source: str) -> list[str]:
    """What a module's source imports from the same row or above."""
    own = unit_of(module)
    return [
        f"{module}, line {line}: {imported}"
        for line, imported in imports(ast.parse(source))
        if not _may_import(own, unit_of(imported))
    ]


def _may_import(own: str, imported: str) -> bool:
    if own.split(".")[0] == imported.split(".")[0]:
        return LEVEL[imported] <= LEVEL[own]
    return LEVEL[imported] < LEVEL[own]


def modules() -> dict[str, Path]:
    """Every module of the package by its name below it."""
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name not in ("__init__", "__main__"):
            found[name] = path
    return found


def test_packages_import_downwards_only() -> None:
    upward = [
        line
        for module, path in sorted(modules().items())
        for line in upward_imports(module, path.read_text())
    ]
    assert upward == []


def test_the_table_lists_everything_once_and_nothing_else() -> None:
    assert sorted(LEVEL) == sorted(unit for row in ORDER for unit in row)
    assert {unit_of(module) for module in modules()} <= set(LEVEL)
    known = modules()
    assert all(unit in known for unit in LEVEL)


def test_the_documentation_shows_the_same_table() -> None:
    text = (ROOT.parent / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| \d+ \| ([^|]+) \|", text, flags=re.MULTILINE)
    assert [set(re.findall("`([^`]+)`", row)) for row in rows] == [set(row) for row in ORDER]


def test_imports_of_every_kind_are_seen() -> None:
    source = """
from typing import TYPE_CHECKING
from megatron_dlm import platform
import megatron_dlm.errors
if TYPE_CHECKING:
    from megatron_dlm.training.run import Run
def late():
    import megatron_dlm.teacher.frozen
    from megatron_dlm.objectives import OBJECTIVES
"""
    found = upward_imports("rollout.engine", source)
    assert [line.split(": ")[1] for line in found] == [
        "training.run.Run",
        "teacher.frozen",
        "objectives.OBJECTIVES",
    ]
