"""Process groups and seeds: from one plain process to a torchrun job."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed import HashStore  # type: ignore[attr-defined] # documented, not listed

from megatron_dlm import platform
from megatron_dlm.config.schema import Config
from megatron_dlm.entry import rank, world_size
from megatron_dlm.errors import UserError


def initialize(config: Config) -> None:
    """Select the device, join the process group and split it into model-parallel groups.

    Works under torchrun or Slurm (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`,
    `LOCAL_RANK`) and in a plain process, which becomes a group of one.
    """
    device = platform.select(config.parallel.device)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            backend=platform.collective_backend(),
            # One process has nobody to find: it needs no address and no port.
            store=HashStore() if world_size() == 1 else None,
            rank=rank(),
            world_size=world_size(),
            timeout=timedelta(minutes=config.parallel.distributed_timeout_minutes),
            device_id=device if device.type == "cuda" else None,
        )
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    _set_seeds(config)


def _set_seeds(config: Config) -> None:
    torch.manual_seed(config.data.seed)
    model_parallel_cuda_manual_seed(config.data.seed)


@contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """Raise a `UserError` of any rank on all of them, so that none waits for the one that ended.

    Collective; the body must not be.

    Raises:
        UserError: That of the lowest rank that has one.
    """
    own: UserError | None = None
    try:
        yield
    except UserError as error:
        own = error
    messages: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(messages, None if own is None else str(own))
    for message in messages:
        if message is not None:
            raise UserError(message) from own


@contextmanager
def initialized(config: Config) -> Iterator[None]:
    """`initialize` on entry; on exit leave the groups, so that another layout can follow.

    One process has one layout: a block in another one uses the groups that are there.
    """
    if world_size() == 1 and parallel_state.model_parallel_is_initialized():
        platform.select(config.parallel.device)
        _set_seeds(config)
        yield
        return
    joined_before = torch.distributed.is_initialized()
    initialize(config)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        if not joined_before:
            torch.distributed.destroy_process_group()
