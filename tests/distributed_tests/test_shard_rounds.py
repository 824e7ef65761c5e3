"""Prompts are split evenly, and a replica may be late by more than a collective's timeout."""

import time
from datetime import timedelta

import torch.distributed as dist

from megatron_dlm.config import Config
from megatron_dlm.parallel import ParallelGroups, initialized
from megatron_dlm.teacher.shard_rounds import ended_by_all, rounds
from tests.distributed_tests.spawn import run_distributed

TIMEOUT = timedelta(seconds=6)


def _deal(rank: int) -> tuple[list[tuple[list[int], int]], list[tuple[list[int], int]]]:
    """This rank's shards: with rank 1 slow, and where shards cannot be equal."""
    with initialized(Config.from_dict({"device": "cpu"})):
        dist.distributed_c10d._set_pg_timeout(TIMEOUT, dist.group.WORLD)
        groups, slowly = ParallelGroups.from_parallel_state(), []
        with ended_by_all():
            for dealt in rounds([0, 1, 2, 3, 4], "test", groups, prompts_per_shard=1):
                slowly.append(dealt)
                if rank == 1 and len(slowly) == 1:
                    time.sleep(TIMEOUT.seconds + 2)
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=60), dist.group.WORLD)
        return slowly, list(rounds([3, 4, 8, 9, 11], "test", groups, prompts_per_shard=4))


def test_work_is_dealt_evenly_and_the_slowest_is_waited_for() -> None:
    (first, evenly_first), (last, evenly_last) = run_distributed(_deal, 2)
    # Six shards of at most one prompt: one of them has none.
    assert len(first) == len(last) == 3
    shards = [shard for shard, _ in first + last]
    assert sorted(index for shard in shards for index in shard) == [0, 1, 2, 3, 4]
    assert max(map(len, shards)) == 1
    assert all(most == 1 for _, most in first + last)
    assert (evenly_first, evenly_last) == ([([3, 4], 3)], [([8, 9, 11], 3)])
