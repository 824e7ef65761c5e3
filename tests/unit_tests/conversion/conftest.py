import pytest

from megatron_dlm.config import Config
from megatron_dlm.training.initialize import initialized


@pytest.fixture(scope="package", autouse=True)
def single_process():
    with initialized(Config()):
        yield
