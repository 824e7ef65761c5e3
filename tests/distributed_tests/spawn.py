"""Run a function in several gloo processes on this machine."""

import gc
import io
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.gloo import share_gloo_device

# Ranks are forks of one clean process that has imported what takes seconds to import: every
# optimizer of PyTorch imports torch._dynamo when it is made, FlexAttention the rest.
PROCESSES = mp.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "pytest",
        "tests.tiny",
        "megatron_dlm.api",
        "torch._dynamo",
        "torch._dynamo.backends.debugging",
        "torch._functorch.aot_autograd",
    ]
)

_join: Callable[[], None]
"""Joins this rank's world; set in the processes of `run_distributed`."""


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 300
) -> list[Any]:
    """Call fn(rank, *args) in `world_size` processes that form one gloo world.

    Args:
        fn: A module-level function; it and its arguments are pickled.
        world_size: Number of processes, each on one thread.
        args: Passed on.
        timeout_seconds: For the whole run, and for each collective in it.

    Returns:
        What each rank returned, in rank order.

    Raises:
        AssertionError: A rank failed, died or did not end in time. The message holds its
            traceback; the other ranks, which would wait for it, are terminated.
    """
    for _ in range(2):
        with suppress(NoWorld):  # nothing has been called yet
            return _run_world(fn, world_size, *args, timeout_seconds=timeout_seconds)
    return _run_world(fn, world_size, *args, timeout_seconds=timeout_seconds)


class NoWorld(AssertionError):
    """The processes did not come together: on a busy machine gloo takes a connection for closed."""


def _run_world(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float
) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        ranks = {
            receiver: (rank, process)
            for rank, (receiver, process) in enumerate(
                start_ranks(fn, world_size, Path(folder), *args, timeout_seconds=timeout_seconds)
            )
        }
        results: dict[int, Any] = {}
        pending = list(ranks)
        deadline = monotonic() + timeout_seconds
        try:
            while pending:
                ready = wait(pending, timeout=max(0.0, deadline - monotonic()))
                if not ready:
                    missing = sorted(ranks[receiver][0] for receiver in pending)
                    raise AssertionError(f"ranks {missing} did not end in {timeout_seconds} s")
                for receiver in ready:
                    assert isinstance(receiver, Connection)
                    rank, process = ranks[receiver]
                    try:
                        succeeded, result = receiver.recv()
                    except EOFError:
                        process.join()
                        raise AssertionError(
                            f"rank {rank} died with exit status {process.exitcode}"
                        ) from None
                    if succeeded is None:
                        raise NoWorld(f"rank {rank} found no others:\n{result}")
                    if not succeeded:
                        raise AssertionError(f"rank {rank} failed:\n{result}")
                    results[rank] = torch.load(io.BytesIO(result), weights_only=False)
                    pending.remove(receiver)
        finally:
            for _, process in ranks.values():
                if len(results) < world_size:
                    process.terminate()
                process.join()
    return [results[rank] for rank in range(world_size)]


def start_ranks(
    fn: Callable[..., Any],
    world_size: int,
    folder: Path,
    *args: Any,
    timeout_seconds: float = 300,
) -> list[tuple[Connection, Any]]:
    """Start the processes of `run_distributed`; they meet in an empty folder.

    Returns:
        Of each rank: where it reports its end, and its process.
    """
    ranks = []
    for rank in range(world_size):
        receiver, sender = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(
            target=_run_rank,
            args=(sender, fn, rank, world_size, (folder / "store").as_uri(), timeout_seconds, args),
            daemon=False,  # writing a distributed checkpoint starts processes of its own
        )
        process.start()
        sender.close()
        ranks.append((receiver, process))
    return ranks


def rejoin_world() -> None:
    """Leave the world and form it anew; all ranks of `run_distributed` call this.

    The threads of gloo's groups, which never rest, end with the world and with the last object that
    holds a group: a function that builds one layout after the other would gather thousands.
    """
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    _join()


def stay_on_one_core() -> None:
    """Keep the ranks of this world side by side, those of the next xdist worker on the next core.

    What they exchange wakes no other core then, which takes a fifth of the processor's time of
    small models. The kernel puts what has one process wherever there is room.
    """
    if hasattr(os, "sched_setaffinity"):  # not on a Mac
        cores = sorted(os.sched_getaffinity(0))
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        os.sched_setaffinity(0, {cores[worker % len(cores)]})


@contextmanager
def outside_world() -> Iterator[None]:
    """Leave the world, for what forms one of its own, and form it anew; all ranks call this."""
    dist.destroy_process_group()
    yield
    _join()


def _run_rank(
    sender: Connection,
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    timeout_seconds: float,
    args: tuple[Any, ...],
) -> None:
    global _join
    gc.freeze()  # what all ranks share in memory stays shared: no collection looks at it
    stay_on_one_core()
    torch.set_num_threads(1)
    share_gloo_device()
    worlds = count()

    def join() -> None:
        dist.init_process_group(
            "gloo",
            init_method=f"{store}{next(worlds)}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )

    _join = join
    try:
        _join()
        dist.barrier()
    except RuntimeError:
        sender.send((None, traceback.format_exc()))
        return
    try:
        # Serialised by value: torch would send tensors as handles to memory that dies with us.
        buffer = io.BytesIO()
        torch.save(fn(rank, *args), buffer)
        dist.barrier()
        dist.destroy_process_group()
        sender.send((True, buffer.getvalue()))
    except BaseException:
        # SystemExit too: the caller reports whatever ended this rank.
        sender.send((False, traceback.format_exc()))
