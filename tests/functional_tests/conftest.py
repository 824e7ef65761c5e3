"""Fixtures of tests that run the entry points."""

from pathlib import Path

import pytest

from tests.functional_tests.entry_points import Call, caller
from tests.tiny import save_random_model, write_data


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `dense`, `moe`, `prompts.jsonl`, `examples.jsonl`; tests do not change it."""
    folder = tmp_path_factory.mktemp("files")
    save_random_model(folder / "dense")
    save_random_model(folder / "moe", moe=True)
    write_data(folder, 8)
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(monkeypatch, capsys)
