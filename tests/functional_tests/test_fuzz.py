"""Odd inputs end in a result or in one line: a few here, `make fuzz` takes ten thousand."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.inputs import feed
from tests.fuzz.template import write_runs


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    folder = tmp_path_factory.mktemp("fuzz")
    write_runs(folder / "template")

    def make() -> Path:
        shutil.rmtree(folder / "work", ignore_errors=True)
        return Path(shutil.copytree(folder / "template", folder / "work"))

    return make


@settings(
    max_examples=40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(number=st.integers(min_value=0, max_value=2**32))
def test_an_odd_input_ends_in_a_result_or_one_line(
    make_folder: Callable[[], Path], number: int
) -> None:
    fed = feed(number, make_folder)
    assert fed.problem is None, f"{fed.detail}\n{fed.problem}"
