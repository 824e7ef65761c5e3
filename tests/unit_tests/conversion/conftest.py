import importlib.util
import sys
from pathlib import Path

import pytest

from megatron_dlm.config import Config
from megatron_dlm.parallel import initialized

TOOL = Path(__file__).parents[3] / "tools" / "convert_checkpoint.py"


@pytest.fixture(scope="module")
def single_process():
    """Process groups of one process, for tests that build models."""
    with initialized(Config()):
        yield


@pytest.fixture
def convert(monkeypatch, capsys):
    """Run the tool; returns its exit status and what it wrote to standard error."""
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "convert_checkpoint", module)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        capsys.readouterr()
        status = module.main()
        return status, capsys.readouterr().err

    return run
