"""All ranks stop at the same place, whichever of them was asked to.

Two kinds of places. After an update all ranks are in step: one reduction over all of them decides.
Within a rollout, or while a teacher answers prompts, replicas of the model make different numbers
of forwards, and only the ranks of a replica (with those that share its experts) are in step. There,

- a rank that is asked to stop writes it into the store that the processes met at, and a thread of
  every rank looks there once a second, so that all replicas learn of it;
- ranks in step reduce the wish once a forward, over gloo and while the forward runs: the device
  never waits for it, and it takes effect one forward later, or as many as are in flight in the
  stages of a pipeline, which do not wait for each other because of it;
- who leaves meets the others at the end of what was left, where all ranks learn whether one did.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.stop_request import StopRequest, StopRequested

POLL_SECONDS = 1.0

_runs = count()


@dataclass(frozen=True)
class Decision:
    """What all ranks do now.

    Attributes:
        stop: Number of the signal, or `TIME_IS_UP`; 0 to go on.
        save: Whether a checkpoint is due.
    """

    stop: int
    save: bool


class StopAgreement:
    """Agrees with the other ranks; all of them make one for a run, at the same time.

    Args:
        request: The wish of this process.
        groups: Process groups of the run.
        timeout: How long a rank may wait for the others; None: what torch waits by default.
        asked_elsewhere: What processes of the job that are not of this group were asked to
            (`StopRequest.code`), looked at once a second; None: there are none.
    """

    def __init__(
        self,
        request: StopRequest,
        groups: ParallelGroups,
        timeout: timedelta | None = None,
        asked_elsewhere: Callable[[], int] | None = None,
    ) -> None:
        self._request = request
        self._asked_elsewhere = asked_elsewhere
        self._seen = 0
        self._in_step: dist.ProcessGroup | None = None
        self._pending: deque[tuple[Tensor, Any]] = deque()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._everyone: dist.ProcessGroup | None = None
        if dist.get_world_size() == 1 and asked_elsewhere is None:
            return
        is_gloo = dist.get_backend() == "gloo"
        self._everyone = (
            dist.group.WORLD if is_gloo else dist.new_group(backend="gloo", timeout=timeout)
        )
        self._in_step = ranks_in_step(groups, timeout)
        self._store = dist.distributed_c10d._get_default_store()
        self._key = f"megatron_dlm/stop/{next(_runs)}"
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def requested(self) -> int:
        """The wish as far as this rank knows; others may not know yet."""
        return self._request.code or self._seen

    def check(self, in_flight: int = 1) -> None:
        """Before a forward: leave if a rank in step with this one wanted to at an earlier check.

        Args:
            in_flight: Number of that check, counted back from this one; the same on all ranks in
                step.

        Raises:
            StopRequested: On all ranks in step.
        """
        code = self.requested
        if self._in_step is not None:
            code = self._result(in_flight)
            flag = torch.tensor([self.requested])
            work = dist.all_reduce(flag, dist.ReduceOp.MAX, self._in_step, async_op=True)
            self._pending.append((flag, work))
        if code:
            raise StopRequested(code)

    def check_all(self) -> None:
        """Where all ranks are in step: leave if one of them wants to; all call this.

        Raises:
            StopRequested: On all ranks.
        """
        code = self.decide().stop
        if code:
            raise StopRequested(code)

    def _result(self, in_flight: int = 1) -> int:
        """What the ranks in step wanted at all checks but the last `in_flight` - 1."""
        code = 0
        while len(self._pending) >= in_flight:
            flag, work = self._pending.popleft()
            work.wait()
            code = max(code, int(flag))
        return code

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Around work that ranks may leave one by one: all or none have left it afterwards.

        Raises:
            StopRequested: On all ranks, if one raised it in the block.
        """
        code = 0
        try:
            yield
        except StopRequested as stop:
            code = stop.code
        (code,) = self._highest(code)
        if code:
            raise StopRequested(code)

    def decide(self, save: bool = False) -> Decision:
        """Where all ranks are in step: whether to stop or save; all call this.

        Args:
            save: Whether this rank wants a checkpoint.
        """
        stop, save_now = self._highest(self.requested, int(save))
        return Decision(stop, bool(save_now))

    def agree(self, waits: bool, has_failed: bool) -> tuple[bool, bool]:
        """Where all ranks wait in step for something outside: whether any still does; all call it.

        Args:
            waits: Whether this rank does.
            has_failed: Whether what it waits for never comes.

        Returns:
            Both, of any rank.

        Raises:
            StopRequested: On all ranks, if one wants to stop.
        """
        stop, waiting, failed = self._highest(self.requested, int(waits), int(has_failed))
        if stop:
            raise StopRequested(stop)
        return bool(waiting), bool(failed)

    def _highest(self, *values: int) -> list[int]:
        """The largest of each value over all ranks."""
        highest = torch.tensor(values)
        if self._everyone is not None:
            dist.all_reduce(highest, dist.ReduceOp.MAX, self._everyone)
        return [int(value) for value in highest]

    def _watch(self) -> None:
        """Tell the other ranks, or learn from them."""
        with suppress(RuntimeError):  # the store is gone, and the rank that kept it
            while not self._closed.wait(POLL_SECONDS):
                if self._request.code:
                    self._store.set(self._key, str(self._request.code))
                    return
                if self._store.check([self._key]):
                    self._seen = int(self._store.get(self._key))
                    return
                if self._asked_elsewhere is not None and (code := self._asked_elsewhere()):
                    self._seen = code
                    return

    def __enter__(self) -> "StopAgreement":
        """Close it at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """See `close`."""
        self.close()

    def close(self) -> None:
        """End what runs beside the training; without other ranks, which may be gone."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(RuntimeError):
            self._result()


def ranks_in_step(groups: ParallelGroups, timeout: timedelta | None) -> dist.ProcessGroup | None:
    """The ranks that make as many forwards as this one; None where it would be alone.

    Those of its replica, those that share experts with one of these, and so on; all ranks call
    this.
    """
    own, groups = [dist.get_rank()], groups.for_decoding()
    for group in (groups.model, groups.lockstep):
        if group is not None:
            own += dist.get_process_group_ranks(group)
    tied: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(tied, own)
    parts: list[set[int]] = []
    for ranks in tied:
        joined = set(ranks).union(*(part for part in parts if part & set(ranks)))
        parts = [part for part in parts if not part & joined] + [joined]
    if all(len(part) == 1 for part in parts):
        return None
    mine, _ = dist.new_subgroups_by_enumeration(
        [sorted(part) for part in parts], timeout=timeout, backend="gloo"
    )
    return mine if mine is not None and mine.size() > 1 else None
