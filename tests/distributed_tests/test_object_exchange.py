"""Objects with tensors between the ranks of a group that is not all of them."""

from typing import Any

import torch
import torch.distributed as dist

from megatron_dlm import object_exchange
from tests.distributed_tests.spawn import run_distributed


def _exchange(rank: int) -> dict[str, Any]:
    group = dist.new_group([1, 2])
    if rank not in (1, 2):
        return {}
    own = {"rank": rank, "tokens": torch.arange(rank)}
    return {
        "all": object_exchange.all_gather(own, group),
        "first": object_exchange.gather(own, group),
        "broadcast": object_exchange.broadcast(own, group),
    }


def test_ranks_of_a_group() -> None:
    nothing, first, second = run_distributed(_exchange, 3)
    assert nothing == {}
    for found in (first["all"], second["all"], first["first"]):
        assert [entry["rank"] for entry in found] == [1, 2]
        assert [entry["tokens"].tolist() for entry in found] == [[0], [0, 1]]
    assert second["first"] == []
    assert first["broadcast"]["rank"] == second["broadcast"]["rank"] == 1
