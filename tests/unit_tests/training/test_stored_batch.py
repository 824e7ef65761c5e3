"""A trajectory in a checkpoint is the one that was rolled out; a checkpoint is due in time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.training import save_schedule
from megatron_dlm.training.save_schedule import SaveSchedule
from megatron_dlm.training.stored_batch import (
    StoredTrajectories,
    read_trajectories,
    restored,
    stored,
    write_trajectories,
)
from megatron_dlm.types.trajectory import Prompt, Trajectory

ids = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(lambda x: torch.tensor(x).long())

trajectories = st.builds(
    Trajectory,
    sample_index=st.integers(0, 2**50),
    prompt_ids=ids,
    response_ids=ids,
    unmask_step=ids,
    tail_ids=ids,
    tail_unmask_step=ids,
    finish_reason=st.sampled_from(["eos", "length", "unfinished"]),
    canvas_length=st.none() | st.integers(1, 99),
    denoising_forwards=st.integers(0, 99),
    total_forwards=st.integers(0, 99),
    correct=st.none() | st.booleans(),
    tries=st.integers(1, 9),
    rollouts=st.integers(1, 9),
    record=st.dictionaries(st.text(), st.text(), max_size=2),
)


@settings(max_examples=30)
@given(batch=st.lists(trajectories, max_size=3), left=st.lists(trajectories, max_size=3))
def test_a_stored_batch_comes_back(
    batch: list[Trajectory], left: list[Trajectory], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    assert read_trajectories(folder) == ((), (), ())
    written = StoredTrajectories([*map(stored, batch)], [*map(stored, left)], [*map(stored, left)])
    write_trajectories(folder, written)
    found = read_trajectories(folder)
    assert (len(found.batch), len(found.leftovers)) == (len(batch), len(left))
    entries = [*found.batch, *found.leftovers, *found.ahead]
    for entry, expected in zip(entries, [*batch, *left, *left], strict=True):
        prompt = Prompt(expected.sample_index, expected.prompt_ids, expected.record)
        values: dict[str, Any] = vars(restored(entry, prompt))
        for name, value in vars(expected).items():
            same = torch.equal(values[name], value) if torch.is_tensor(value) else None
            assert values[name] == value if same is None else same, name


def test_checkpoints_are_due_by_updates_and_by_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(save_schedule.time, "monotonic", lambda: now)
    by_updates = SaveSchedule(interval=4, minutes=0, iteration=0)
    assert not by_updates.is_due(3, ends_rollout=True)
    assert not by_updates.is_due(4, ends_rollout=False)
    assert by_updates.is_due(5, ends_rollout=True)
    by_updates.saved(5)
    assert not by_updates.is_due(7, ends_rollout=True)
    assert by_updates.is_due(8, ends_rollout=True)
    by_minutes = SaveSchedule(interval=0, minutes=2, iteration=0)
    now = 119.0
    assert not by_minutes.is_due(9, ends_rollout=True)
    now = 120.0
    assert by_minutes.is_due(9, ends_rollout=False)
    by_minutes.saved(9)
    assert not by_minutes.is_due(10, ends_rollout=True)
    assert not SaveSchedule(interval=0, minutes=0, iteration=0).is_due(99, ends_rollout=True)
