"""What passes between the thread that answers HTTP and the one that decodes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.serving.api_error import ApiError
from megatron_dlm.types.trajectory import Prompt

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Started:
    """The prompts of a job are read; it waits for slots.

    Attributes:
        prompt_tokens: Of all its prompts.
    """

    prompt_tokens: int


@dataclass(frozen=True)
class Text:
    """More text of one response.

    Attributes:
        index: Of the response.
        text: Not empty.
    """

    index: int
    text: str


@dataclass(frozen=True)
class Finished:
    """One response is complete.

    Attributes:
        index: Of the response.
        reason: `stop` for EOS and stop strings.
        completion_tokens: Up to EOS, included, or to the token that completed a stop string.
        forwards: Forwards that drew tokens for it.
    """

    index: int
    reason: FinishReason
    completion_tokens: int
    forwards: int


@dataclass(frozen=True)
class Failed:
    """The job has ended without an answer."""

    error: ApiError


Event = Started | Text | Finished | Failed


@dataclass(eq=False)
class Job:
    """A request to decode: for each of its prompts the same number of responses.

    Response j to prompt i has the index i * n + j; its draws are keyed by i and j
    (`megatron_dlm.evaluation.generation.sample_number`), so `n` does not change the first ones.

    Attributes:
        read: Returns the prompts, each with the limit of its response; raises `ApiError`. Called by
            the decoding thread.
        n: Responses to each prompt.
        generation: Decoding settings.
        seed: Of the draws.
        stops: Stop strings.
        notify: Takes the job's events in order, in the decoding thread; `Failed`, or `Finished` of
            the last response, is the last one.
        cancelled: Set by anyone: what is left is not decoded, and no event follows.
        submitted: Time of its creation, of `time.monotonic`.
    """

    read: Callable[[], list[Prompt]]
    n: int
    generation: GenerationConfig
    seed: int
    stops: list[str]
    notify: Callable[[Event], None]
    cancelled: bool = False
    submitted: float = field(default_factory=time.monotonic)
