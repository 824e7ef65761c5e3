"""Fixtures and settings that all tests share."""

import gc
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from megatron_dlm.config import Config, ParallelConfig
from megatron_dlm.parallel import initialized
from tests.gloo import share_gloo_device

TESTS = Path(__file__).parent
THREADS = Path("/proc/self/task")
"""Threads of this process, where the system is Linux."""

# A loaded machine is no defect: examples are limited in number, never in time.
hypothesis.settings.register_profile("default", deadline=None, max_examples=30)
hypothesis.settings.load_profile("default")


LONGEST_FIRST = (
    "distributed_tests/test_training_layouts.py",
    "functional_tests/test_resume.py",
    "functional_tests/test_preemption.py",
    "distributed_tests/test_adapter_layouts.py",
    "distributed_tests/test_context_layouts.py",
    "functional_tests/test_d_opsd.py",
    "distributed_tests/test_rollout_engine.py",
    "functional_tests/test_quickstart.py",
    "functional_tests/test_objectives_learn.py",
    "functional_tests/test_tiny_models.py",
    "unit_tests/planning/test_at_size.py",
    "unit_tests/training/test_train_step.py",
    "functional_tests/test_bad_input.py",
    "functional_tests/test_restarts.py",
    "unit_tests/rollout/test_full_attention.py",
    "unit_tests/rollout/test_engine.py",
    "unit_tests/rollout/test_draw_kernels.py",
    "functional_tests/test_remote_teacher.py",
    "functional_tests/test_serving.py",
    "functional_tests/test_harness.py",
    "unit_tests/report/test_trajectory_page.py",
    "unit_tests/rollout/test_batch.py",
    "functional_tests/test_chat.py",
    "functional_tests/test_tools.py",
    "functional_tests/test_one_command.py",
    "functional_tests/test_golden.py",
    "unit_tests/conversion/test_full_attention_formats.py",
    "functional_tests/test_output_places.py",
    "distributed_tests/test_checkpoint_saving.py",
    "functional_tests/test_critical_batch_size.py",
    "functional_tests/test_new_strategy.py",
    "functional_tests/test_preprocess_data.py",
    "functional_tests/test_families.py",
    "functional_tests/test_divergence.py",
)
"""Files that take longest, in that order: none of them is left for one worker at the end."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out `layouts` where it is not asked for; put the tests of the longest files first."""
    if "layouts" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("layouts")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    place = {TESTS / file: number for number, file in enumerate(LONGEST_FIRST)}
    assert all(file.is_file() for file in place)
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(scope="session", autouse=True)
def light_process() -> Iterator[None]:
    torch.set_num_threads(1)
    share_gloo_device()
    gc.freeze()  # modules: no collection need look at them
    yield
    gc.unfreeze()  # libraries would report what nobody collects as leaks


@pytest.fixture(scope="module", autouse=True)
def groups_end() -> Iterator[None]:
    """Free models, for they hold process groups, whose threads take the processor's time."""
    before = _threads()
    yield
    if not THREADS.is_dir() or _threads() > before:
        gc.collect()


def _threads() -> int:
    return len(list(THREADS.iterdir())) if THREADS.is_dir() else 0


@pytest.fixture(scope="module")
def single_process() -> Iterator[None]:
    """Megatron's groups for a world of one."""
    with initialized(Config(parallel=ParallelConfig(device="cpu"))):
        yield
