"""The decoding thread: takes jobs into the running batch between forwards.

Jobs are served in the order that they came in. A job whose client has gone, or whose stop string
came, gives its slots back before the next forward.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

from megatron_dlm.evaluation.generation import sample_number
from megatron_dlm.evaluation.text_stream import TextStream
from megatron_dlm.rollout.batch import DecodingBatch
from megatron_dlm.rollout.work import RolloutWork
from megatron_dlm.serving.api_error import ApiError
from megatron_dlm.serving.jobs import Failed, Finished, FinishReason, Job, Started, Text
from megatron_dlm.serving.metrics import Metrics
from megatron_dlm.terminal import say
from megatron_dlm.types.trajectory import Prompt, Trajectory


def stopping_error() -> ApiError:
    """The error of requests that a stopping server does not answer."""
    return ApiError(503, "the server is stopping", code="server_stopping")


class _Stop:
    """The wish to end, in the inbox."""


@dataclass(eq=False)
class _Response:
    """One response of a job, waiting or in decoding."""

    job: Job
    index: int
    prompt: Prompt
    stream: TextStream
    num_settled: int = 0
    has_text: bool = False


class Scheduler:
    """Decodes jobs until it is told to stop.

    Args:
        batch: Empty.
        work: What the batch notes its forwards in.
        decode: Text of the tokens of a response.
        metrics: Counters.
        shutdown_timeout_s: Seconds that jobs have after `stop`.

    Attributes:
        stopping: Whether `stop` was called: no job should be submitted any more.
    """

    def __init__(
        self,
        batch: DecodingBatch,
        work: RolloutWork,
        decode: Callable[[list[int]], str],
        metrics: Metrics,
        shutdown_timeout_s: float,
    ) -> None:
        self.stopping = False
        self._batch = batch
        self._work = work
        self._decode = decode
        self._metrics = metrics
        self._shutdown_timeout_s = shutdown_timeout_s
        self._deadline = float("inf")
        # Its `put` may be called by a signal handler while `get` waits in the same thread.
        self._inbox: SimpleQueue[Job | _Stop] = SimpleQueue()
        self._waiting: deque[_Response] = deque()
        self._running: dict[int, _Response] = {}
        self._next_number = 0
        self._lock = threading.Lock()
        self._has_ended = False

    def submit(self, job: Job) -> None:
        """Hand over a job; from any thread."""
        with self._lock:
            if not self._has_ended:
                self._inbox.put(job)
                return
        job.notify(Failed(stopping_error()))

    def stop(self) -> None:
        """Finish the jobs that there are, then end `run`; from any thread or a signal handler."""
        self.stopping = True
        self._inbox.put(_Stop())

    def run(self) -> None:
        """Decode; the calling thread holds the model in evaluation mode, without gradients.

        Whatever ends it, every job that is left gets an error.
        """
        error = ApiError(500, "decoding failed; the server's log has the reason")
        try:
            while self._take_jobs():
                self._drop_cancelled()
                self._admit()
                if self._batch.num_active:
                    self._forward()
            error = stopping_error()
        finally:
            self._fail_all(error)

    def _take_jobs(self) -> bool:
        """Read the inbox, waiting for something to do; False to end.

        One job at most while others are decoded, whose streams would wait for the tokenizer.
        """
        while True:
            is_idle = not self._waiting and not self._running
            if time.monotonic() > self._deadline:
                return False
            try:
                item = self._inbox.get(block=is_idle and not self.stopping)
            except Empty:
                return not is_idle
            if isinstance(item, Job):
                self._open(item)
                if self._running:
                    return True
            else:
                self._deadline = min(self._deadline, time.monotonic() + self._shutdown_timeout_s)

    def _open(self, job: Job) -> None:
        """Read a job's prompts and have its responses wait."""
        if job.cancelled:
            return
        try:
            prompts = job.read()
        except ApiError as error:
            job.notify(Failed(error))
            return
        except Exception:  # a defect, but of this request only
            self._fail(job)
            return
        job.notify(Started(sum(len(prompt.token_ids) for prompt in prompts)))
        for place, prompt in enumerate(prompts):
            for number in range(job.n):
                own = replace(prompt, sample_index=sample_number(place, number))
                stream = TextStream(self._decode, job.stops)
                self._waiting.append(_Response(job, place * job.n + number, own, stream))

    def _fail(self, job: Job) -> None:
        """End a job after an error that nobody expected; called where it was caught."""
        say(traceback.format_exc().rstrip(), error=True)
        error = ApiError(500, "the request cannot be decoded; the server's log has the reason")
        job.notify(Failed(error))
        job.cancelled = True
        self._drop_cancelled()

    def _drop_cancelled(self) -> None:
        for number, response in list(self._running.items()):
            if response.job.cancelled:
                self._end(number)
        if any(response.job.cancelled for response in self._waiting):
            self._waiting = deque(r for r in self._waiting if not r.job.cancelled)

    def _admit(self) -> None:
        while self._waiting:
            response, number = self._waiting[0], self._next_number
            job = response.job
            try:
                if not self._batch.admit(number, response.prompt, job.generation, job.seed):
                    break
            except Exception:
                self._fail(job)
                continue
            self._waiting.popleft()
            self._running[number] = response
            self._next_number += 1
            self._metrics.prompt_tokens.inc(len(response.prompt.token_ids))
            self._metrics.queue_seconds.observe(time.monotonic() - job.submitted)
        self._show_load()

    def _show_load(self) -> None:
        self._metrics.waiting.set(len(self._waiting))
        self._metrics.running.set(len(self._running))

    def _forward(self) -> None:
        began = time.monotonic()
        finished, _ = self._batch.step()
        self._metrics.forward_seconds.inc(time.monotonic() - began)
        self._metrics.forwards.inc()
        self._metrics.forward_tokens.inc(sum(self._work.take().tokens))
        for number, trajectory in finished:
            self._finish(self._running.pop(number), trajectory)
        for number, tokens in list(self._batch.settled()):
            response = self._running[number]
            if len(tokens) > response.num_settled:
                more = tokens[response.num_settled :].tolist()
                response.num_settled = len(tokens)
                self._give(response, response.stream.push(more))
                if response.stream.stopped:
                    self._close(response, "stop", self._end(number))
        self._show_load()

    def _end(self, number: int) -> int:
        """Take a running response out of the batch; returns its forwards."""
        del self._running[number]
        return self._batch.cancel(number)

    def _finish(self, response: _Response, trajectory: Trajectory) -> None:
        """Give out the rest of a response that was decoded to its end."""
        stream = response.stream
        text = stream.push(trajectory.response_ids[response.num_settled :].tolist())
        self._give(response, text + stream.finish())
        reached_end = stream.stopped or trajectory.finish_reason == "eos"
        self._close(response, "stop" if reached_end else "length", trajectory.denoising_forwards)

    def _give(self, response: _Response, text: str) -> None:
        if not text:
            return
        if not response.has_text:
            response.has_text = True
            seconds = time.monotonic() - response.job.submitted
            self._metrics.first_text_seconds.observe(seconds)
        response.job.notify(Text(response.index, text))

    def _close(self, response: _Response, reason: FinishReason, forwards: int) -> None:
        tokens = response.stream.num_tokens
        self._metrics.completion_tokens.inc(tokens)
        self._metrics.response_forwards.inc(forwards)
        self._metrics.tokens_per_forward.observe(tokens / forwards)
        response.job.notify(Finished(response.index, reason, tokens, forwards))

    def _fail_all(self, error: ApiError) -> None:
        left = dict.fromkeys(r.job for r in (*self._running.values(), *self._waiting))
        with self._lock:
            self._has_ended = self.stopping = True
            while not self._inbox.empty():
                item = self._inbox.get()
                if isinstance(item, Job):
                    left[item] = None
        for job in left:
            job.notify(Failed(error))
        self._running.clear()
        self._waiting.clear()
        self._show_load()
