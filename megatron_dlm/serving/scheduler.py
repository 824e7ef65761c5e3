"""Jobs of the API in the decoding thread: into the running batch between forwards.

Jobs are served in the order that they came in. A job whose client has gone, or whose stop string
came, gives its slots back before the next forward.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_dlm.evaluation.generation import sample_number
from megatron_dlm.evaluation.text_stream import TextStream
from megatron_dlm.rollout.batch import DecodingBatch
from megatron_dlm.rollout.work import RolloutWork
from megatron_dlm.serving.api_error import ApiError
from megatron_dlm.serving.decoding_thread import DecodingThread
from megatron_dlm.serving.jobs import Failed, Finished, FinishReason, Job, Started, Text
from megatron_dlm.serving.metrics import Metrics
from megatron_dlm.terminal import say
from megatron_dlm.types.trajectory import Prompt, Trajectory


@dataclass(eq=False)
class _Response:
    """One response of a job, waiting or in decoding."""

    job: Job
    index: int
    prompt: Prompt
    stream: TextStream
    num_settled: int = 0
    has_text: bool = False


class Scheduler(DecodingThread[Job, _Response]):
    """Decodes jobs until it is told to stop.

    Args:
        batch, work, metrics, shutdown_timeout_s: See `DecodingThread`.
        decode: Text of the tokens of a response.
    """

    def __init__(
        self,
        batch: DecodingBatch,
        work: RolloutWork,
        decode: Callable[[list[int]], str],
        metrics: Metrics,
        shutdown_timeout_s: float,
    ) -> None:
        super().__init__(batch, work, metrics, shutdown_timeout_s)
        self._decode = decode

    def _read(self, job: Job) -> bool:
        """Read a job's prompts and have its responses wait.

        One job at most while others are decoded, whose streams would wait for the tokenizer.
        """
        self._open(job)
        return bool(self._running)

    def _open(self, job: Job) -> None:
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

    def _is_cancelled(self, response: _Response) -> bool:
        return response.job.cancelled

    def _begin(self) -> None:
        while self._waiting:
            response = self._waiting[0]
            job = response.job
            try:
                if not self._admit(response, response.prompt, job.generation, job.seed):
                    break
            except Exception:
                self._fail(job)
                continue
            self._waiting.popleft()
            self._metrics.queue_seconds.observe(time.monotonic() - job.submitted)

    def _give_settled(self) -> None:
        for number, tokens in list(self._batch.settled()):
            response = self._running[number]
            if len(tokens) > response.num_settled:
                more = tokens[response.num_settled :].tolist()
                response.num_settled = len(tokens)
                self._give(response, response.stream.push(more))
                if response.stream.stopped:
                    self._close(response, "stop", self._end(number))

    def _finish(self, response: _Response, trajectory: Trajectory) -> None:
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

    def _refuse(self, left: Sequence[Job | _Response], error: ApiError) -> None:
        jobs = [item.job if isinstance(item, _Response) else item for item in left]
        for job in dict.fromkeys(jobs):
            job.notify(Failed(error))
