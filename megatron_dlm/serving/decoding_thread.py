"""The thread of a server that decodes: its inbox, its end, and forwards of the running batch."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from megatron_dlm.rollout.batch import DecodingBatch
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.work import RolloutWork
from megatron_dlm.serving.api_error import ApiError
from megatron_dlm.serving.metrics import Metrics
from megatron_dlm.types.trajectory import Prompt, Trajectory

Item = TypeVar("Item")
"""What is handed over to the thread."""
Response = TypeVar("Response")
"""What waits for its turn and is in decoding: a response and who wants it."""


def stopping_error() -> ApiError:
    """The error of requests that a stopping server does not answer."""
    return ApiError(503, "the server is stopping", code="server_stopping")


class _Stop:
    """Put into the inbox, it asks the thread to end."""


class DecodingThread(ABC, Generic[Item, Response]):
    """Decodes what is handed over until it is told to stop; what came before that is finished.

    Args:
        batch: Empty.
        work: What the batch notes its forwards in.
        metrics: Counters.
        shutdown_timeout_s: Seconds that what is there has after `stop`.

    Attributes:
        stopping: Whether `stop` was called: nothing should be handed over any more.
    """

    def __init__(
        self, batch: DecodingBatch, work: RolloutWork, metrics: Metrics, shutdown_timeout_s: float
    ) -> None:
        self.stopping = False
        self._batch = batch
        self._metrics = metrics
        self._waiting: deque[Response] = deque()
        self._running: dict[int, Response] = {}
        self._work = work
        self._shutdown_timeout_s = shutdown_timeout_s
        self._deadline = float("inf")
        # Its `put` may be called by a signal handler while `get` waits in the same thread.
        self._inbox: SimpleQueue[Item | _Stop] = SimpleQueue()
        self._next_number = 0
        self._lock = threading.Lock()
        self._has_ended = False

    def submit(self, item: Item) -> None:
        """Hand something over; from any thread."""
        with self._lock:
            if not self._has_ended:
                self._inbox.put(item)
                return
        self._refuse([item], stopping_error())

    def stop(self) -> None:
        """Finish what is there, then end `run`; from any thread or a signal handler."""
        self.stopping = True
        self._inbox.put(_Stop())

    def run(self) -> None:
        """Decode; the calling thread holds the model in evaluation mode, without gradients.

        Whatever ends it, everyone who waits gets an error.
        """
        error = ApiError(500, "decoding failed; the server's log has the reason")
        try:
            while self._take():
                self._drop_cancelled()
                self._begin()
                self._show_load()
                if self._batch.num_active:
                    self._forward()
                    self._show_load()
            error = stopping_error()
        finally:
            self._fail_all(error)

    @abstractmethod
    def _read(self, item: Item) -> bool:
        """Take in what was handed over; True: forwards come before more of it is read."""

    @abstractmethod
    def _is_cancelled(self, response: Response) -> bool:
        """Whether nobody waits for it any more."""

    @abstractmethod
    def _begin(self) -> None:
        """Admit what there is room for, in order."""

    @abstractmethod
    def _finish(self, response: Response, trajectory: Trajectory) -> None:
        """Give out a response that was decoded to its end."""

    @abstractmethod
    def _refuse(self, left: Sequence[Item | Response], error: ApiError) -> None:
        """Tell everyone who waits for something of this that it will not come."""

    def _can_begin(self) -> bool:
        """Whether something could be begun now."""
        return bool(self._waiting)

    def _give_settled(self) -> None:
        """Give out what has come of running responses, after each forward."""

    def _take(self) -> bool:
        """Read the inbox, waiting for something to do; False to end."""
        while True:
            is_idle = not self._running and not self._can_begin()
            if time.monotonic() > self._deadline:
                return False
            try:
                item = self._inbox.get(block=is_idle and not self.stopping)
            except Empty:
                return not is_idle
            if isinstance(item, _Stop):
                self._deadline = min(self._deadline, time.monotonic() + self._shutdown_timeout_s)
            elif self._read(item):
                return True

    def _forward(self) -> None:
        began = time.monotonic()
        finished, _ = self._batch.step()
        self._metrics.forward_seconds.inc(time.monotonic() - began)
        self._metrics.forwards.inc()
        self._metrics.forward_tokens.inc(sum(self._work.take().tokens))
        for number, trajectory in finished:
            self._finish(self._running.pop(number), trajectory)
        self._give_settled()

    def _admit(
        self, response: Response, prompt: Prompt, generation: GenerationConfig, seed: int | None
    ) -> bool:
        """Have the batch decode a response; False if it has no room."""
        if not self._batch.admit(self._next_number, prompt, generation, seed):
            return False
        self._running[self._next_number] = response
        self._next_number += 1
        self._metrics.prompt_tokens.inc(len(prompt.token_ids))
        return True

    def _end(self, number: int) -> int:
        """Take a running response out of the batch; returns its forwards."""
        del self._running[number]
        return self._batch.cancel(number)

    def _drop_cancelled(self) -> None:
        for number, response in list(self._running.items()):
            if self._is_cancelled(response):
                self._end(number)
        if any(map(self._is_cancelled, self._waiting)):
            self._waiting = deque(r for r in self._waiting if not self._is_cancelled(r))

    def _show_load(self) -> None:
        self._metrics.waiting.set(len(self._waiting))
        self._metrics.running.set(len(self._running))

    def _fail_all(self, error: ApiError) -> None:
        left: list[Item | Response] = [*self._running.values(), *self._waiting]
        with self._lock:
            self._has_ended = self.stopping = True
            while not self._inbox.empty():
                item = self._inbox.get()
                if not isinstance(item, _Stop):
                    left.append(item)
        self._refuse(left, error)
        self._running.clear()
        self._waiting.clear()
        self._show_load()
