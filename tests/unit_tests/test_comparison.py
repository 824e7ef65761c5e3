"""The table of features says of this package what commands and tests show."""

import re

import pytest

from megatron_dlm.commands import COMMANDS
from megatron_dlm.config import Config
from megatron_dlm.config.fields import flag_of, option_fields
from megatron_dlm.config.objective_traits import OBJECTIVE_TRAITS
from megatron_dlm.evaluation.rewards import REWARDS
from megatron_dlm.evaluation.tasks import TASKS
from tests.tiny import REPOSITORY

PAGE = (REPOSITORY / "docs" / "comparison.md").read_text(encoding="utf-8")
FLAGS = {flag_of(name) for name in option_fields(Config)}


def _rows(heading: str) -> list[list[str]]:
    """Cells of a table below a heading, without its own first lines."""
    part = PAGE.split(heading, 1)[1].split("\n## ", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


FEATURES = _rows("# What others have")
EVIDENCE = dict(_rows("## Our column"))


def test_every_feature_has_evidence_and_all_cells() -> None:
    assert {len(row) for row in FEATURES} == {8}
    ours = {row[0] for row in FEATURES if row[1] not in ("no", "not yet")}
    assert ours == set(EVIDENCE)
    assert not [row for row in FEATURES if "" in row]


def test_the_readme_has_rows_of_this_table() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in PAGE.splitlines() if line.startswith("|")]
    first = readme.index(table[0])
    rows = [line for line in readme[first:] if line.startswith("|")][: readme[first:].index("")]
    assert len(rows) > 10
    assert {*rows} <= {*table}
    features = next(line for line in readme if "[The whole table]" in line)
    assert f" {len(FEATURES)} features" in features


@pytest.mark.parametrize("feature", EVIDENCE)
def test_what_shows_a_feature_exists(feature: str) -> None:
    named = re.findall(r"`([^`]+)`", EVIDENCE[feature])
    assert any(name.startswith("tests/") for name in named)
    makefile = (REPOSITORY / "Makefile").read_text()
    for name in named:
        command, _, rest = name.partition(" ")
        if name.startswith("tests/"):
            assert "def test_" in (REPOSITORY / name).read_text()
        elif command == "megatron-dlm":
            assert rest in COMMANDS
        elif command == "make":
            assert f"\n{rest}:" in makefile
        else:
            assert command in FLAGS
            assert not rest or (command == "--objective" and rest in OBJECTIVE_TRAITS)


def test_the_number_of_benchmarks_is_right() -> None:
    ours = {row[0]: row[1] for row in FEATURES}
    assert ours["evaluation"].startswith(f"{len(set(TASKS) - set(REWARDS))} benchmarks")
