"""The tiny model that servers decode with."""

from collections.abc import Iterator

import pytest

from megatron_dlm.models.model import DiffusionGPTModel
from tests.unit_tests.rollout.tiny_models import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionGPTModel]:
    with tiny_model(tmp_path_factory.mktemp("qwen3")) as loaded:
        yield loaded
