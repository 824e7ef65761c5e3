"""Ranks that die, stall or fail, as real processes: who says what, and how the others end."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import FileStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from megatron_dlm import rank_watch
from megatron_dlm.activity import ACTIVITY
from megatron_dlm.errors import UserError
from megatron_dlm.rank_watch import RankState, RankWatch, stalled
from tests.distributed_tests.spawn import PROCESSES

WORLD_SIZE = 3
LONG = 1000.0


def _work(seconds: float = LONG) -> None:
    """Come forward all the time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ACTIVITY.step()
        time.sleep(0.02)


def _die() -> None:
    _work(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    _work(0.5)
    os.kill(os.getpid(), signal.SIGSTOP)


def _stuck() -> None:
    _work(0.5)
    time.sleep(LONG)


def _hold_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(3)
    _work(0.5)


def _fail() -> None:
    _work(0.5)
    raise RuntimeError("out of memory\nand more")


def _refuse() -> None:
    raise UserError("--lr = -1: is negative; choose 0 or more")


def _leave() -> None:
    _work(1.0)


def _run_rank(
    rank: int, folder: Path, act: Callable[[], None], stall_seconds: float, limit_seconds: float
) -> None:
    with (folder / f"{rank}.txt").open("w") as output:
        os.dup2(output.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    rank_watch.BEAT_SECONDS = 0.1
    rank_watch.GRACE_SECONDS = 0.5
    store: Store = FileStore(str(folder / "store"), WORLD_SIZE)
    if (folder / "port").exists():
        store = TCPStore("127.0.0.1", int((folder / "port").read_text()), is_master=False)
    watch = RankWatch(
        PrefixStore("attempt_0", store),
        PrefixStore("attempt_1", store),
        rank=rank,
        world_size=WORLD_SIZE,
        address="localhost",
        stall_seconds=stall_seconds,
        limit_seconds=limit_seconds,
    )
    try:
        ACTIVITY.enter("update")
        with watch:
            act()
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except RuntimeError:
        sys.exit(7)


class Ranks:
    """Processes of a small job, and what they have said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[BaseProcess] = []

    def start(
        self,
        acts: dict[int, Callable[[], None]],
        stall_seconds: float = LONG,
        limit_seconds: float = LONG,
        ranks: range = range(WORLD_SIZE),
    ) -> None:
        """Start them; what is not among the acts works on."""
        for rank in ranks:
            arguments: Any = (rank, self.folder, acts.get(rank, _work), stall_seconds)
            process = PROCESSES.Process(target=_run_rank, args=(*arguments, limit_seconds))
            process.start()
            self.processes.append(process)

    def statuses(self) -> list[int | None]:
        """How they ended."""
        for process in self.processes:
            process.join(60)
        return [process.exitcode for process in self.processes]

    def said(self, rank: int) -> list[str]:
        """Lines of a rank's standard error."""
        return (self.folder / f"{rank}.txt").read_text().splitlines()

    def name(self, rank: int) -> str:
        """What the others call it."""
        process = f"process {self.processes[rank].pid}, phase update"
        return f"rank {rank} on {os.uname().nodename} ({process})"


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    started = Ranks(tmp_path)
    yield started
    for process in started.processes:
        process.kill()
        process.join()


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_rank_is_named_once_and_ends_the_others(ranks: Ranks, dead: int) -> None:
    ranks.start({dead: _die})
    expected = [1] * WORLD_SIZE
    expected[dead] = -signal.SIGKILL
    assert ranks.statuses() == expected
    lines = [line for rank in range(WORLD_SIZE) for line in ranks.said(rank)]
    assert lines == [f"error: {ranks.name(dead)} died"]


def test_a_rank_that_lets_nobody_run_beside_it_is_not_dead(ranks: Ranks) -> None:
    ranks.start({0: _leave, 1: _hold_the_interpreter, 2: _leave})
    assert ranks.statuses() == [0, 0, 0]
    assert [ranks.said(rank) for rank in range(WORLD_SIZE)] == [[], [], []]


def test_a_rank_that_stalls_is_named_with_its_stack_and_ended(ranks: Ranks) -> None:
    ranks.start({1: _stuck}, stall_seconds=1.0, limit_seconds=3.0)
    assert ranks.statuses() == [1, 1, 1]
    text = "\n".join(ranks.said(0))
    assert text.startswith(f"warning: {ranks.name(1)}: no progress for 1 s\n")
    assert f"\nerror: {ranks.name(1)}: no progress for 3 s\n" in text
    assert text.count("no progress") == 2
    assert text.count("in _stuck\n") == 2
    assert ranks.said(1) == ranks.said(2) == []


@pytest.mark.parametrize(("held", "speaker"), [(0, 1), (2, 0)])
def test_a_process_that_is_held_is_named(ranks: Ranks, held: int, speaker: int) -> None:
    ranks.start({held: _stop}, stall_seconds=1.0, limit_seconds=3.0)
    others = [process for rank, process in enumerate(ranks.processes) if rank != held]
    for process in others:
        process.join(60)
    assert [process.exitcode for process in others] == [1, 1]
    warning, error = ranks.said(speaker)
    assert warning.startswith(f"warning: {ranks.name(held)}: no progress for ")
    assert error.startswith(f"error: {ranks.name(held)}: no progress for ")
    assert warning.endswith("its process is there but held")


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_takes_the_others_with_it(ranks: Ranks, failing: int) -> None:
    ranks.start({failing: _fail})
    expected = [1] * WORLD_SIZE
    expected[failing] = 7
    assert ranks.statuses() == expected
    line = f"error: {ranks.name(failing)} failed: RuntimeError: out of memory"
    assert ranks.said(1 - failing) == [line]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_user_error_of_one_rank_is_said_once_and_ends_all(ranks: Ranks, failing: int) -> None:
    ranks.start({failing: _refuse})
    assert ranks.statuses() == [2, 2, 2]
    assert ranks.said(0) == ["error: --lr = -1: is negative; choose 0 or more"]
    assert ranks.said(1) == ranks.said(2) == []


def test_a_user_error_of_all_ranks_is_said_once(ranks: Ranks) -> None:
    ranks.start(dict.fromkeys(range(WORLD_SIZE), _refuse))
    assert ranks.statuses() == [2, 2, 2]
    assert ranks.said(0) == ["error: --lr = -1: is negative; choose 0 or more"]


def test_who_waits_for_a_rank_of_an_attempt_that_is_over_ends(ranks: Ranks) -> None:
    store = PrefixStore("attempt_1", FileStore(str(ranks.folder / "store"), WORLD_SIZE))
    ranks.start({}, ranks=range(2))  # the third died before it came this far
    store.set("started", "1")
    assert ranks.statuses() == [1, 1]


def test_who_waits_where_the_store_dies_ends(ranks: Ranks) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    (ranks.folder / "port").write_text(str(store.port))
    ranks.start({}, ranks=range(2))  # the third would be the one that keeps it
    store.wait([f"attempt_0/started/{rank}" for rank in range(2)])
    del store
    assert ranks.statuses() == [1, 1]
    line = "error: the process that keeps the store of the ranks died"
    # Where the two were connected already, rank 1 was told by rank 0.
    assert [ranks.said(rank)[-1:] for rank in range(2)] in ([[line], [line]], [[line], []])


def test_a_rank_that_does_not_start_is_named(ranks: Ranks) -> None:
    ranks.start({}, limit_seconds=2.0, ranks=range(2))
    assert ranks.statuses()[0] == 2
    assert "ranks 2 have not started" in ranks.said(0)[0]


def _state(rank: int, **values: Any) -> RankState:
    return RankState(rank, idle=values.pop("idle", 100.0), **values)


@pytest.mark.parametrize(
    ("states", "guilty"),
    [
        ([_state(0, idle=1.0), _state(1, idle=2.0)], []),
        ([_state(0, waits_in="all_reduce"), _state(1)], [1]),
        # The rank before it in the pipeline has come further.
        ([_state(0, steps=5), _state(1, steps=4, waits_in="recv")], [0]),
        # Waiting for a device looks like work: the one that is behind.
        ([_state(0, steps=5), _state(1, steps=4), _state(2, steps=5)], [1]),
        ([_state(rank, steps=5, waits_in="barrier") for rank in range(3)], [0, 1, 2]),
        ([_state(0, idle=1.0), _state(1, waits_in="recv")], [1]),
    ],
)
def test_who_holds_the_others_up(states: list[RankState], guilty: list[int]) -> None:
    for state in states:
        state.seen = time.monotonic()
    assert [state.rank for state in stalled(states, 60.0)] == guilty
