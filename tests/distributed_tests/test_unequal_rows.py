"""Dense data-parallel ranks with different numbers of micro-batches train like balanced ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_dlm.training import loop, shares
from megatron_dlm.training.run import Run
from tests.distributed_tests.layouts import OVERLAP
from tests.distributed_tests.spawn import rejoin_world, run_distributed
from tests.tiny import run_config, run_training, save_random_model, write_data


def _most_to_the_first(costs: Sequence[float], ranks: int) -> list[int]:
    return [int(item == 0) for item in range(len(costs))]


def _train(rank: int, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    train_step = loop.train_step
    for name, share in (("balanced", shares.share_by_cost), ("skewed", _most_to_the_first)):
        counts: list[int] = []

        def counted(*arguments: Any, counts: list[int] = counts) -> Any:
            counts.append(len(arguments[4]))
            return train_step(*arguments)

        config = run_config(folder, folder / "dense", save=str(folder / name), **options)
        with (
            mock.patch.object(loop, "train_step", counted),
            mock.patch.object(shares, "share_by_cost", share),
            mock.patch.object(Run, "save"),
        ):
            found[name] = (run_training(config), counts)
        rejoin_world()
    return found


@pytest.mark.parametrize("options", [{}, OVERLAP], ids=["plain", "overlapped"])
def test_ranks_with_one_row_and_with_five(tmp_path: Path, options: dict[str, Any]) -> None:
    write_data(tmp_path)
    save_random_model(tmp_path / "dense")
    options = dict(
        options, rollout_batch_size=12, global_batch_size=6, max_tokens_per_micro_batch=1
    )
    first, second = run_distributed(_train, 2, tmp_path, options)
    assert (first["skewed"][1], second["skewed"][1]) == ([5, 5], [1, 1])
    assert first["balanced"][1] != [5, 5]
    lines, expected = first["skewed"][0], first["balanced"][0]
    assert len(lines) == len(expected) == 2
    for line, of_balanced in zip(lines, expected, strict=True):
        assert line["supervised_tokens"] == of_balanced["supervised_tokens"]
        for name in ("loss", "grad_norm"):
            assert line[name] == pytest.approx(of_balanced[name], rel=1e-5)
