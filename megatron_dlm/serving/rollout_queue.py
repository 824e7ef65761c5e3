"""The rollout server in its decoding thread: responses, and changes of weights between them.

Both are served in the order that they came in. A change waits until what is in decoding has ended,
and what came after it waits for the change: every response is of one version of the weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dlm.rollout.batch import DecodingBatch
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.work import RolloutWork
from megatron_dlm.serving.api_error import ApiError
from megatron_dlm.serving.decoding_thread import DecodingThread
from megatron_dlm.serving.metrics import Metrics
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
    """Asks that the requests end whose names begin with a text."""

    prefix: str


@dataclass(frozen=True)
class _Resume:
    """The end of a pause."""


class RolloutQueue(DecodingThread[Request | Change | _Abort | _Resume, Request | Change]):
    """Decodes until it is told to stop. A change is never in decoding.

    Args:
        batch, work, metrics, shutdown_timeout_s: See `DecodingThread`.
        weight_version: Tells the version of the weights.

    Attributes:
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
        super().__init__(batch, work, metrics, shutdown_timeout_s)
        self.paused = False
        self._weight_version = weight_version

    def abort(self, prefix: str = "") -> None:
        """End the requests whose name begins so; from any thread."""
        self.submit(_Abort(prefix))

    def resume(self) -> None:
        """Begin requests again; from any thread."""
        self.paused = False
        self.submit(_Resume())

    def _can_begin(self) -> bool:
        if not self.paused:
            return super()._can_begin()
        return any(isinstance(item, Change) for item in self._waiting)

    def _read(self, item: Request | Change | _Abort | _Resume) -> bool:
        if isinstance(item, _Abort):
            self._abort(item.prefix)
        elif not isinstance(item, _Resume):
            self._waiting.append(item)
        return False

    def _abort(self, prefix: str) -> None:
        version = self._weight_version()
        requests = [*self._running.values(), *self._waiting]
        for request in requests:
            if isinstance(request, Request) and request.name.startswith(prefix):
                request.notify(Decoded(None, version))
                request.cancelled = True
        self._drop_cancelled()

    def _is_cancelled(self, item: Request | Change) -> bool:
        return isinstance(item, Request) and item.cancelled

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
            try:
                if not self._admit(item, item.prompt, item.generation, item.seed):
                    break
            except Exception as error:
                self._waiting.popleft()
                item.notify(error)
                continue
            self._waiting.popleft()

    def _make_changes_while_paused(self) -> None:
        """Requests that wait for the end of a pause hold no change back."""
        changes = [item for item in self._waiting if isinstance(item, Change)]
        if changes and not self._running:
            self._waiting = deque(i for i in self._waiting if not isinstance(i, Change))
            for change in changes:
                change.notify(_outcome(change.apply))

    def _finish(self, item: Request | Change, trajectory: Trajectory) -> None:
        self._metrics.completion_tokens.inc(len(trajectory.response_ids))
        self._metrics.response_forwards.inc(trajectory.denoising_forwards)
        item.notify(Decoded(trajectory, self._weight_version()))

    def _refuse(self, left: Sequence[Request | Change | _Abort | _Resume], error: ApiError) -> None:
        for item in left:
            if isinstance(item, Request | Change):
                item.notify(error)


def _outcome(apply: Callable[[], Any]) -> Any:
    """What a change returns, or its error."""
    try:
        return apply()
    except Exception as error:
        return error
