"""Process groups and seeds: from one plain process to a torchrun job."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_dlm import platform
from megatron_dlm.config.schema import Config


def world_size() -> int:
    """Number of processes, from torchrun's environment; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Global rank of this process, from torchrun's environment; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def initialize(config: Config) -> None:
    """Select the device, join the process group and split it into model-parallel groups.

    Works under torchrun or Slurm (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`, `LOCAL_RANK`) and
    in a plain process, which becomes a group of one.
    """
    device = platform.select(config.parallel.device)
    if not torch.distributed.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if world_size() == 1:
            os.environ.setdefault("MASTER_PORT", str(_free_port()))
        torch.distributed.init_process_group(
            backend=platform.collective_backend(),
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
    torch.manual_seed(config.data.seed)
    model_parallel_cuda_manual_seed(config.data.seed)


@contextmanager
def initialized(config: Config) -> Iterator[None]:
    """`initialize` on entry; on exit leave the groups, so that another layout can follow."""
    joined_before = torch.distributed.is_initialized()
    initialize(config)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        if not joined_before:
            torch.distributed.destroy_process_group()
