"""A run that leaves its longest responses to later rollouts trains on every sample once."""

import math
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_dlm.errors import UserError
from megatron_dlm.training import loop
from megatron_dlm.training.rollout_batch import Collected
from megatron_dlm.training.run import Run
from tests.tiny import run_config, run_training, save_random_model, write_data

PARTIAL: dict[str, Any] = dict(
    num_rollouts=None,
    num_epochs=1,
    rollout_batch_size=8,
    max_response_length=16,
    dynamic_threshold=0.2,
    max_running_requests=64,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("partial")
    write_data(folder, 28)
    save_random_model(folder / "model")
    return folder


@pytest.mark.parametrize(("share", "rollouts"), [(0.5, 2), (0.7, 4)])
@pytest.mark.slow
def test_every_sample_is_trained_on_once(folder: Path, share: float, rollouts: int) -> None:
    batches: list[Collected] = []
    collect = loop.collect

    def recording(run: Run) -> Collected:
        batches.append(collect(run))
        return batches[-1]

    config = run_config(
        folder,
        folder / "model",
        **PARTIAL,
        save=str(folder / f"run_{share}"),
        partial_rollouts=share,
        max_response_rollouts=rollouts,
    )
    with mock.patch.object(loop, "collect", recording), mock.patch.object(Run, "save"):
        lines = run_training(config)
    trained = [t for batch in batches for t in batch.own]
    assert Counter(t.sample_index for t in trained) == Counter(range(28))
    assert [batch.num_samples for batch in batches] == [8, 8, 8, 4]
    assert all(t.is_finished and t.canvas_length is None for t in trained)
    ages = [t.rollouts for t in trained]
    assert 2 <= max(ages) <= rollouts
    started = 0
    for number, (batch, line) in enumerate(zip(batches, lines[::2], strict=True)):
        own = batch.own
        started = min(28, 8 * number + math.ceil(8 / share))
        assert line["rollout"] == number + 1
        assert line["staleness"] == {
            "continued_share": sum(t.rollouts > 1 for t in own) / len(own),
            "mean_rollouts": sum(t.rollouts - 1 for t in own) / len(own),
            "left": started - sum(b.num_samples for b in batches[: number + 1]),
        }
    assert lines[-1]["staleness"]["left"] == 0
    # What a rollout decodes is counted in it, what it trains on may be older.
    decoded = sum(batch.decoded_tokens for batch in batches)
    assert decoded == sum(len(t.response_ids) for t in trained)
    assert decoded == lines[-1]["response_tokens_total"]


@pytest.mark.slow
def test_a_resumed_run_is_long_enough_for_what_it_has_begun(folder: Path) -> None:
    run = str(folder / "long")
    options = {**PARTIAL, "save": run, "partial_rollouts": 0.5, "save_interval": 6}
    run_training(run_config(folder, folder / "model", **options | {"num_epochs": 2}))
    config = run_config(folder, Path(run) / "iter_0000006", **options)
    with pytest.raises(UserError, match=r"--num-epochs = 1: that is 28 .* 32; .* 32 samples or"):
        run_training(config)
