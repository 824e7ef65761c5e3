"""The decoding thread of the rollout server: responses, and changes of weights between them.

Both are served in the order that they came in. A change waits until what is in decoding has ended,
and what came after it waits for the change: every response is of one version of the weights.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from megatron_dlm.rollout.batch import DecodingBatch
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.work import RolloutWork
from megatron_dlm.serving.api_error import ApiError
from megatron_dlm.serving.metrics import Metrics
from megatron_dlm.serving.scheduler import stopping_error
from megatron_dlm.types.trajectory import Prompt, Trajectory


@dataclass(frozen=True)
class Decoded:
    """A response.

    Attributes:
        trajectory: None where it was aborted.
        weight_version: Of the weights that it was decoded with.
    """

    trajectory: Trajectory | None
    weight_version: str


@dataclass(eq=False)
class Request:
    """One response that is asked for.

    Attributes:
        name: For `abort`.
        prompt: With the limit of its response.
        generation: Decoding settings.
        seed: Of the draws; None: the server's.
        notify: Takes the response or an error, once, in the decoding thread.
        cancelled: Set by anyone: nobody waits for it any more.
    """

    name: str
    prompt: Prompt
    generation: GenerationConfig
    seed: int | None
    notify: Callable[[Decoded | Exception], None]
    cancelled: bool = False


@dataclass(frozen=True, eq=False)
class Change:
    """Something to do while nothing is in decoding.

    Attributes:
        apply: Is called in the decoding thread.
        notify: Takes what it returns, or its error.
    """

    apply: Callable[[], Any]
    notify: Callable[[Any], None]


@dataclass(frozen=True)
class _Abort:
    """The wish that requests end whose name begins so."""

    prefix: str


class _Stop:
    """The wish to end."""


class RolloutQueue:
    """Decodes until it is told to stop.

    Args:
        batch: Empty.
        work: What the batch notes its forwards in.
        metrics: Counters.
        weight_version: Tells the version of the weights.
        shutdown_timeout_s: Seconds that requests have after `stop`.

    Attributes:
        stopping: Whether `stop` was called.
        paused: Set by anyone: no request is begun; changes are made.
    """

    def __init__(
        self,
        batch: DecodingBatch,
        work: RolloutWork,
        metrics: Metrics,
        weight_version: Callable[[], str],
        shutdown_timeout_s: float,
    ) -> None:
        self.stopping = False
        self.paused = False
        self._batch = batch
        self._work = work
        self._metrics = metrics
        self._weight_version = weight_version
        self._shutdown_timeout_s = shutdown_timeout_s
        self._deadline = float("inf")
        # Its `put` may be called by a signal handler while `get` waits in the same thread.
        self._inbox: SimpleQueue[Request | Change | _Abort | _Stop | None] = SimpleQueue()
        self._waiting: deque[Request | Change] = deque()
        self._running: dict[int, Request] = {}
        self._next_number = 0
        self._lock = threading.Lock()
        self._has_ended = False

    def submit(self, item: Request | Change) -> None:
        """Hand over a request or a change; from any thread."""
        with self._lock:
            if not self._has_ended:
                self._inbox.put(item)
                return
        item.notify(stopping_error())

    def abort(self, prefix: str = "") -> None:
        """End the requests whose name begins so; from any thread."""
        self._inbox.put(_Abort(prefix))

    def resume(self) -> None:
        """Begin requests again; from any thread."""
        self.paused = False
        self._inbox.put(None)

    def stop(self) -> None:
        """Finish what is there, then end `run`; from any thread or a signal handler."""
        self.stopping = True
        self._inbox.put(_Stop())

    def run(self) -> None:
        """Decode; the calling thread holds the model in evaluation mode, without gradients.

        Whatever ends it, everyone who waits gets an error.
        """
        error: Exception = ApiError(500, "decoding failed; the server's log has the reason")
        try:
            while self._take():
                self._drop_cancelled()
                self._begin()
                if self._batch.num_active:
                    self._forward()
            error = stopping_error()
        finally:
            self._fail_all(error)

    def _take(self) -> bool:
        """Read the inbox, waiting for something to do; False to end."""
        while True:
            can_begin = self._waiting and (not self.paused or isinstance(self._waiting[0], Change))
            is_idle = not self._running and not can_begin
            if time.monotonic() > self._deadline or (self.stopping and is_idle):
                return False
            try:
                item = self._inbox.get(block=is_idle)
            except Empty:
                return True
            if isinstance(item, _Stop):
                self._deadline = min(self._deadline, time.monotonic() + self._shutdown_timeout_s)
            elif isinstance(item, _Abort):
                self._abort(item.prefix)
            elif item is not None:
                self._waiting.append(item)

    def _abort(self, prefix: str) -> None:
        version = self._weight_version()
        requests = [*self._running.values(), *self._waiting]
        for request in requests:
            if isinstance(request, Request) and request.name.startswith(prefix):
                request.notify(Decoded(None, version))
                request.cancelled = True
        self._drop_cancelled()

    def _drop_cancelled(self) -> None:
        for number, request in list(self._running.items()):
            if request.cancelled:
                del self._running[number]
                self._batch.cancel(number)
        if any(isinstance(item, Request) and item.cancelled for item in self._waiting):
            kept = (i for i in self._waiting if isinstance(i, Change) or not i.cancelled)
            self._waiting = deque(kept)

    def _begin(self) -> None:
        """Admit what there is room for, and make the changes whose turn it is."""
        while self._waiting:
            item = self._waiting[0]
            if isinstance(item, Change):
                if self._running:
                    break
                self._waiting.popleft()
                item.notify(_outcome(item.apply))
                continue
            if self.paused:
                self._make_changes_while_paused()
                break
            number = self._next_number
            try:
                if not self._batch.admit(number, item.prompt, item.generation, item.seed):
                    break
            except Exception as error:
                self._waiting.popleft()
                item.notify(error)
                continue
            self._waiting.popleft()
            self._running[number] = item
            self._next_number += 1
            self._metrics.prompt_tokens.inc(len(item.prompt.token_ids))
        self._metrics.waiting.set(len(self._waiting))
        self._metrics.running.set(len(self._running))

    def _make_changes_while_paused(self) -> None:
        """Requests that wait for the end of a pause hold no change back."""
        changes = [item for item in self._waiting if isinstance(item, Change)]
        if changes and not self._running:
            self._waiting = deque(i for i in self._waiting if not isinstance(i, Change))
            for change in changes:
                change.notify(_outcome(change.apply))

    def _forward(self) -> None:
        began = time.monotonic()
        finished, _ = self._batch.step()
        self._metrics.forward_seconds.inc(time.monotonic() - began)
        self._metrics.forwards.inc()
        self._metrics.forward_tokens.inc(sum(self._work.take().tokens))
        for number, trajectory in finished:
            request = self._running.pop(number)
            tokens = len(trajectory.response_ids)
            self._metrics.completion_tokens.inc(tokens)
            self._metrics.response_forwards.inc(trajectory.denoising_forwards)
            request.notify(Decoded(trajectory, self._weight_version()))

    def _fail_all(self, error: Exception) -> None:
        left: list[Request | Change] = [*self._running.values(), *self._waiting]
        with self._lock:
            self._has_ended = self.stopping = True
            while not self._inbox.empty():
                item = self._inbox.get()
                if isinstance(item, Request | Change):
                    left.append(item)
        for item in left:
            item.notify(error)
        self._running.clear()
        self._waiting.clear()


def _outcome(apply: Callable[[], Any]) -> Any:
    """What a change returns, or its error."""
    try:
        return apply()
    except Exception as error:
        return error
