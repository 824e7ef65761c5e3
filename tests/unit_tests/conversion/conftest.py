import pytest

from megatron_dlm.commands import main
from megatron_dlm.config import Config
from megatron_dlm.parallel import initialized


@pytest.fixture(scope="module")
def single_process():
    """Process groups of one process, for tests that build models."""
    with initialized(Config()):
        yield


@pytest.fixture
def convert(capsys):
    """Run the command; returns its exit status and what it wrote to standard error."""

    def run(*arguments):
        capsys.readouterr()
        status = main(["convert", *map(str, arguments)])
        return status, capsys.readouterr().err

    return run
