"""Modelling code of exported folders: several modules joined into one clean file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dlm.conversion.formats.diffusion_files import write_remote_code
from megatron_dlm.conversion.self_contained_code import PACKAGE, REMOTE_CODE, self_contained_code

FORMATS = ("sdar", "sdar_moe", "a2d_qwen3", "rnd")
NAMES = {"qwen2": "Qwen2", "llama": "Llama", "mistral": "Mistral"}
PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


def definitions(text):
    """Classes and functions of a file, with their whole source."""
    nodes = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    return {node.name: ast.unparse(node) for node in nodes}


@pytest.mark.parametrize("format", FORMATS)
def test_files_import_nothing_that_is_not_shipped_and_change_no_definition(format):
    configuration = self_contained_code(f"configuration_{format}")
    model = self_contained_code(f"modeling_{format}", f"configuration_{format}")

    def relative(text):
        nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)]
        return {node.module for node in nodes if node.level}

    assert relative(configuration) == set()
    assert relative(model) == {f"configuration_{format}"}
    of_configuration, of_model = definitions(configuration), definitions(model)
    assert not of_configuration.keys() & of_model.keys()
    originals = {}
    strategies = (PACKAGE / "rollout" / "strategies").glob("*.py")
    draws = (
        f"rollout/{name}"
        for name in ("uniforms", "block_draws", "nucleus", "top_p_search", "verification_draws")
    )
    others = [PACKAGE / f"{name}.py" for name in ("ranges", "models/rotary", *draws)]
    for file in (*REMOTE_CODE.glob("*.py"), *strategies, *others):
        originals |= definitions(file.read_text())
    for name, source in {**of_configuration, **of_model}.items():
        assert source == originals[name], name
    assert "DiffusionConfig" in of_configuration
    assert "DecoderLayer" in of_model
    assert ("SparseMoeBlock" in of_model) == (format in ("sdar_moe", "rnd"))


def test_files_pass_our_own_linter(tmp_path):
    for format in FORMATS:
        write_remote_code(format, tmp_path)
    for name in NAMES.values():
        write_remote_code("a2d_qwen3", tmp_path, renamed=("Qwen3", name))
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", PYPROJECT, "."]
        done = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_a_family_s_files_differ_from_qwen3_s_in_the_name_alone(tmp_path):
    write_remote_code("a2d_qwen3", tmp_path)
    for family, name in NAMES.items():
        write_remote_code("a2d_qwen3", tmp_path, renamed=("Qwen3", name))
        for module in ("configuration", "modeling"):
            text = (tmp_path / f"{module}_a2d_{family}.py").read_text()
            assert "qwen3" not in text.lower()
            renamed = text.replace(f"A2D{name}", "A2DQwen3").replace(f"a2d_{family}", "a2d_qwen3")
            same = (tmp_path / f"{module}_a2d_qwen3.py").read_text().splitlines()[4:]
            for found, expected in zip(renamed.splitlines()[4:], same, strict=True):
                assert found.replace(f"a2d-{family}", "a2d-qwen3") == expected


BASE = '"""Base."""\n\nimport torch\n\nSIZE = 1\n'


def test_each_part_and_import_once_and_in_order(tmp_path):
    (tmp_path / "base.py").write_text(BASE)
    for name in ("left", "right"):
        text = f'"""The {name}."""\n\nimport json\n\nimport torch\n\nfrom .base import SIZE\n\n\n'
        (tmp_path / f"{name}.py").write_text(
            f"{text}# A remark.\ndef {name}():\n    return SIZE, json, torch\n"
        )
    (tmp_path / "top.py").write_text(
        '"""Top."""\n\nfrom .left import left\nfrom .right import right\n\nBOTH = (left, right)\n'
    )
    text = self_contained_code("top", source=tmp_path)
    lines = [
        line for line in text.splitlines() if line and not line.startswith((" ", "# S", "# G"))
    ]
    assert lines[1:] == [
        '"""Top."""',
        "import json",
        "import torch",
        "# Base.",
        "SIZE = 1",
        "# The left.",
        "# A remark.",
        "def left():",
        "# The right.",
        "# A remark.",
        "def right():",
        "BOTH = (left, right)",
    ]
    kept = self_contained_code("top", kept="left", source=tmp_path)
    assert "from .left import SIZE, left\n" in kept
    assert "SIZE = 1" not in kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from .base import SIZE\n\nSIZE = 2\n", "top and base both define SIZE"),
        ("from .base import SIZE as S\n", "renames what it imports from base"),
        ("from .base import *\n", "renames what it imports from base"),
        ("from . import base\n", "imports from more than the modules beside it"),
        ("from ..base import SIZE\n", "imports from more than the modules beside it"),
        ("X = 1\nfrom .base import SIZE\n", "after its first definition"),
        ("def f():\n    from .base import SIZE\n    return SIZE\n", "after its first definition"),
    ],
)
def test_what_cannot_be_joined_is_refused(tmp_path, text, message):
    (tmp_path / "base.py").write_text(BASE)
    (tmp_path / "top.py").write_text(f'"""Top."""\n\n{text}')
    with pytest.raises(ValueError, match=message):
        self_contained_code("top", source=tmp_path)
