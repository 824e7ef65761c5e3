import pytest

from megatron_dlm.config import Config
from megatron_dlm.training.initialize import initialized


@pytest.fixture(scope="module")
def single_process():
    """Process groups of one process, for tests that build models."""
    with initialized(Config()):
        yield
