"""A missing package of an extra is an error with the extra's name, before any work."""

import tomllib
from pathlib import Path

import pytest

from megatron_dlm.commands import main
from megatron_dlm.data.json_records import RecordsInMemory
from megatron_dlm.data.prompts import PromptDataset
from megatron_dlm.data.token_table import TokenTable
from megatron_dlm.evaluation.rewards import REWARDS
from megatron_dlm.extras import EXTRAS
from tests.refusal import refusal

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_each_package_is_in_its_extra_and_no_dependency() -> None:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    extras = project["optional-dependencies"]
    for package, extra in EXTRAS.items():
        name = package.replace("_", "-")
        assert any(requirement.startswith(name) for requirement in extras[extra])
        assert not any(requirement.startswith(name) for requirement in project["dependencies"])


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.mark.usefixtures("nothing_installed")
def test_scoring_by_value_asks_for_its_extra() -> None:
    prompts = PromptDataset(RecordsInMemory([{"prompt": "?", "answer": "1"}], "p"), TokenTable())
    text = str(refusal(REWARDS["math_verify"].check, prompts))
    assert "math_verify is not installed; install it with pip install 'megatron-dlm[eval]'" in text
    assert refusal(REWARDS["exact_match"].check, prompts) is None


@pytest.mark.usefixtures("nothing_installed")
def test_plotting_asks_for_its_extra_before_it_trains(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["critical-batch-size"]) == 2
    assert "megatron-dlm[plots]" in capsys.readouterr().err
