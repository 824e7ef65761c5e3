"""Fixtures and settings that all tests share."""

import gc
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from megatron_dlm.config import Config, ParallelConfig
from megatron_dlm.parallel import initialized

# A loaded machine is no defect: examples are limited in number, never in time.
hypothesis.settings.register_profile("default", deadline=None, max_examples=30)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def light_process() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # modules: no collection need look at them


@pytest.fixture(scope="module", autouse=True)
def groups_end() -> Iterator[None]:
    """Free models, for they hold process groups, whose threads take the processor's time."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def single_process() -> Iterator[None]:
    """Megatron's groups for a world of one."""
    with initialized(Config(parallel=ParallelConfig(device="cpu"))):
        yield
