"""Bodies of responses, whole and in pieces of a stream."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from megatron_dlm import __version__
from megatron_dlm.serving.jobs import Finished, Text
from megatron_dlm.serving.requests import Endpoint

DONE = b"data: [DONE]\n\n"
"""End of a stream."""


def stream_event(body: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


@dataclass
class Answer:
    """The responses of one request as they come.

    Attributes:
        endpoint: Kind of the response.
        model: Name of the model, as in the request.
        num_choices: Responses to come.
        prompt_tokens: Of all prompts.
        texts: Pieces of each response.
        finished: By the index of the response.
        id: Of the request.
        created: Unix time in seconds.
    """

    endpoint: Endpoint
    model: str
    num_choices: int
    prompt_tokens: int
    texts: list[list[str]] = field(init=False)
    finished: dict[int, Finished] = field(default_factory=dict)
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.texts = [[] for _ in range(self.num_choices)]
        prefix = "chatcmpl" if self.endpoint == "chat.completion" else "cmpl"
        self.id = f"{prefix}-{uuid.uuid4().hex}"

    @property
    def is_complete(self) -> bool:
        """Whether all responses have ended."""
        return len(self.finished) == self.num_choices

    def add(self, event: Text | Finished) -> None:
        """Take in what came."""
        if isinstance(event, Text):
            self.texts[event.index].append(event.text)
        else:
            self.finished[event.index] = event

    def body(self) -> dict[str, Any]:
        """The whole response."""
        choices = []
        for index, texts in enumerate(self.texts):
            text = "".join(texts)
            content: dict[str, Any] = {"text": text}
            if self.endpoint == "chat.completion":
                message = {"role": "assistant", "content": text, "refusal": None}
                content = {"message": message}
            choices.append(self._choice(index, content, self.finished[index].reason))
        return self._envelope(self.endpoint, choices) | {"usage": self._usage()}

    def first_pieces(self) -> list[dict[str, Any]]:
        """What a stream begins with: who speaks, in a chat."""
        if self.endpoint != "chat.completion":
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._piece([self._choice(i, {"delta": delta})]) for i in range(self.num_choices)]

    def piece(self, event: Text | Finished) -> dict[str, Any]:
        """What a stream says of an event."""
        text = event.text if isinstance(event, Text) else ""
        reason = event.reason if isinstance(event, Finished) else None
        content: dict[str, Any] = {"text": text}
        if self.endpoint == "chat.completion":
            content = {"delta": {"content": text} if text else {}}
        return self._piece([self._choice(event.index, content, reason)])

    def usage_piece(self) -> dict[str, Any]:
        """The last piece of a stream that was asked for its usage."""
        return self._piece([]) | {"usage": self._usage()}

    def _choice(
        self, index: int, content: dict[str, Any], reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": None, "finish_reason": reason}

    def _piece(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chat = self.endpoint == "chat.completion"
        return self._envelope("chat.completion.chunk" if chat else self.endpoint, choices)

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"megatron-dlm-{__version__}",
            "choices": choices,
        }

    def _usage(self) -> dict[str, Any]:
        completion_tokens = sum(f.completion_tokens for f in self.finished.values())
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
            # Not OpenAI's: forwards that drew tokens, counted for each response.
            "forwards": sum(f.forwards for f in self.finished.values()),
        }
