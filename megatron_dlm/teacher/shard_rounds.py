"""Distribute the prompts that a store lacks over the replicas of the teacher, round by round."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise

import torch

from megatron_dlm.data.shard_store import ShardStore
from megatron_dlm.parallel import ParallelGroups, from_rank_zero
from megatron_dlm.stop_request import StopRequested
from megatron_dlm.terminal import say

PROMPTS_PER_SHARD = 512
"""Most prompts in one shard. An interruption loses at most one shard on each rank."""

_PATIENCE = timedelta(days=365)
"""How long a replica that is done waits for the others; longer than any of them can take."""


def missing_prompts(store: ShardStore, wanted: Iterable[int]) -> list[int]:
    """Which of the wanted prompts a store lacks, the same on all ranks; all call this.

    Args:
        store: A new one gets its header written.
        wanted: Indices of prompts, ascending.

    Raises:
        UserError: A stored shard is damaged; raised on all ranks.
    """

    def look() -> list[int]:
        store.create()
        return store.missing(wanted)

    return from_rank_zero(look)


@contextmanager
def ended_by_all() -> Iterator[None]:
    """Around all rounds: ranks wait for each other at the end; collective.

    Replicas decode independently, and may end further apart than a collective waits.

    Raises:
        StopRequested: On all ranks, if one raised it in the block.
    """
    group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
    code = torch.tensor([0])
    try:
        yield
    except StopRequested as stop:
        code += stop.code
    torch.distributed.all_reduce(code, torch.distributed.ReduceOp.MAX, group)
    torch.distributed.destroy_process_group(group)
    if code:
        raise StopRequested(int(code))


def shards_of(missing: list[int], replicas: int, prompts_per_shard: int) -> list[list[int]]:
    """Prompts in shards of at most so many, as many for each replica; equal to within a prompt."""
    number = replicas * -(-len(missing) // (replicas * prompts_per_shard))
    bounds = [len(missing) * shard // number for shard in range(number + 1)]
    return [missing[first:last] for first, last in pairwise(bounds)]


def rounds(
    missing: list[int],
    what: str,
    groups: ParallelGroups,
    prompts_per_shard: int = PROMPTS_PER_SHARD,
) -> Iterator[tuple[list[int], int]]:
    """This rank's shard in each round, and the size of the round's largest one.

    All shards have the same size, to within one prompt. Every rank takes part in every round, with
    an empty shard if need be: experts are shared between ranks. Used within `ended_by_all`.

    Args:
        missing: As `missing_prompts` returned it, not empty.
        what: What the shards hold, for the progress line.
        groups: Process groups of the teacher.
        prompts_per_shard: Most prompts of a shard.
    """
    replicas = groups.num_replicas
    shards, done = shards_of(missing, replicas, prompts_per_shard), 0
    for start in range(0, len(shards), replicas):
        of_round = shards[start : start + replicas]
        yield of_round[groups.replica], max(map(len, of_round))
        done += sum(map(len, of_round))
        if torch.distributed.get_rank() == 0:
            say(f"{what}: {done}/{len(missing)} prompts")
