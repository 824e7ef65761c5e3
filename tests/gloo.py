"""Gloo's groups of one process on one device.

A device has a thread that wakes a hundred times a second, and by default each group has its own.
Megatron makes dozens of groups: together they take several per cent of a core in every process.
"""

import os
from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroupGloo, distributed_c10d
from torch.distributed.distributed_c10d import Store


def share_gloo_device() -> None:
    """Let all groups that this process makes from now on use one device; again, it does nothing."""
    if distributed_c10d.ProcessGroupGloo is not ProcessGroupGloo:
        return
    devices: dict[int, Any] = {}  # by process: a fork has none of its parent's threads

    class OnOneDevice(ProcessGroupGloo):
        def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
            process = os.getpid()
            if process not in devices:
                devices[process] = ProcessGroupGloo.create_default_device()
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices = [devices[process]]
            options._timeout, options._threads = timeout, 1
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = OnOneDevice  # type: ignore[misc]
