"""Missing shards of a store, dealt out to the data-parallel ranks round by round."""

from collections.abc import Iterator

import torch
from megatron.core import parallel_state

from megatron_dlm.data.shard_store import ShardStore

PROMPTS_PER_SHARD = 512
"""Prompts in one shard: what an interruption can lose on a rank."""


def missing_shards(store: ShardStore, prompts_per_shard: int = PROMPTS_PER_SHARD) -> list[range]:
    """What is missing of a store, the same on all ranks; all call this.

    Args:
        store: Its header is written if it is new.
        prompts_per_shard: Most prompts of a shard, where the store is new.
    """
    missing: list[list[range]] = [[]]
    if torch.distributed.get_rank() == 0:
        dp_size = parallel_state.get_data_parallel_world_size()
        # With few prompts, every rank still has a shard to work on.
        store.create(min(prompts_per_shard, -(-store.header.num_prompts // dp_size)))
        missing = [store.missing()]
    torch.distributed.broadcast_object_list(missing, src=0)
    return missing[0]


def rounds(missing: list[range], what: str) -> Iterator[tuple[range, int]]:
    """This rank's shard in each round, and the size of the round's largest one.

    Every rank takes part in every round, if only with `range(0)`: experts are shared between ranks.

    Args:
        missing: As `missing_shards` returned it.
        what: What the shards hold, for the line of progress.
    """
    dp_rank = parallel_state.get_data_parallel_rank()
    dp_size = parallel_state.get_data_parallel_world_size()
    for start in range(0, len(missing), dp_size):
        dealt = missing[start : start + dp_size]
        yield (dealt[dp_rank] if dp_rank < len(dealt) else range(0)), max(map(len, dealt))
        if torch.distributed.get_rank() == 0:
            done = min(start + dp_size, len(missing))
            print(f"{what}: {done}/{len(missing)} shards", flush=True)
    torch.distributed.barrier()
