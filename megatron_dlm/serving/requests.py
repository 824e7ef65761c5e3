"""Requests of OpenAI's API: their fields, checked, and what they ask of the engine.

A field that would change the response and is not offered is refused, not ignored: `NEUTRAL` has the
values of such fields that ask for nothing. Decoding options of the command line are fields too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from megatron_dlm.errors import UserError
from megatron_dlm.rollout.decoding_options import STRATEGY_OPTIONS
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.serving.api_error import ApiError, bad_field

MAX_STOPS = 16
MAX_STOP_LENGTH = 1024

IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Fields that say nothing about the response."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Values that are accepted of fields that are not offered; null always is."""

_ALWAYS = ("temperature", "top_p", "top_k")

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Request(BaseModel):
    """Fields that both endpoints have, with OpenAI's meaning, and those of `DecodingConfig`."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def limit(self) -> tuple[str, int | None]:
        """The field of the longest response in tokens, and its value."""
        return "max_tokens", self.max_tokens

    def check(self) -> None:
        """Refuse fields that are unknown or ask for what is not offered.

        Raises:
            ApiError: There is one.
        """
        if self.stream_options is not None and not self.stream:
            raise bad_field("stream_options", "is for streams; set stream to true, or drop it")
        for name, value in (self.model_extra or {}).items():
            if value is None or name in IGNORED or name in STRATEGY_FIELDS:
                continue
            if name not in NEUTRAL:
                raise bad_field(name, "is unknown; drop it", "unknown_parameter")
            if not any(_same(value, neutral) for neutral in NEUTRAL[name]):
                raise bad_field(name, "is not supported; drop it", "unsupported_parameter")

    def generation(self, default: GenerationConfig) -> GenerationConfig:
        """The decoding settings of the request.

        Args:
            default: Those of the server.

        Raises:
            ApiError: One is out of range, or the request's strategy does not read it.
        """
        given: dict[str, Any] = {
            name: getattr(self, name) for name in _ALWAYS if getattr(self, name) is not None
        }
        extra = self.model_extra or {}
        for name, read in STRATEGY_FIELDS.items():
            if extra.get(name) is not None:
                given[name] = read(name, extra[name])
        steps = given.keys() - {*_ALWAYS}
        if default.is_autoregressive and steps:
            problem = "the model is decoded from left to right, without steps; drop it"
            raise bad_field(min(steps), problem)
        try:
            generation = replace(default, **given)
        except UserError as error:
            # "--flag = value: problem; remedy"
            text = re.sub(r"--([a-z-]+)", lambda m: m[1].replace("-", "_"), str(error))
            name = text.partition(" = ")[0]
            raise ApiError(400, text, param=name if name in given else None) from error
        unread = given.keys() - generation.options_read - {"top_k", "top_p"}
        if unread:
            name = min(unread)
            raise bad_field(name, f"{generation.remasking_strategy} has no use for it; drop it")
        return generation


def _same(value: Any, other: Any) -> bool:
    """Whether two JSON values are equal; to Python, false is 0 too."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _strategy(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise bad_field(name, "is no string")
    return value


def _number(kind: type[int] | type[float]) -> Callable[[str, Any], float]:
    def read(name: str, value: Any) -> float:
        fits = isinstance(value, int if kind is int else int | float)
        if isinstance(value, bool) or not fits:
            raise bad_field(name, "is no whole number" if kind is int else "is no number")
        try:
            return kind(value)
        except OverflowError as error:
            raise bad_field(name, "is too large") from error

    return read


STRATEGY_FIELDS: dict[str, Callable[[str, Any], Any]] = {
    "remasking_strategy": _strategy,
    **{name: _number(option.type) for name, option in STRATEGY_OPTIONS.items()},
}
"""Fields of the decoding strategies, and how their values are read."""


class ChatRequest(_Request):
    """A request to /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def limit(self) -> tuple[str, int | None]:
        """The field of the longest response in tokens, and its value."""
        if self.max_completion_tokens is None:
            return super().limit()
        return "max_completion_tokens", self.max_completion_tokens


class CompletionRequest(_Request):
    """A request to /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]


_UNIONS = {
    "prompt": "is neither a text nor token ids, nor a list of texts or of lists of token ids",
    "stop": f"is neither a string of 1 to {MAX_STOP_LENGTH} characters nor a list of up to"
    f" {MAX_STOPS} of them",
}
"""What is wrong with a field of several types, of which pydantic names the first only."""


def validation_error(errors: list[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors as an error of the API."""
    first = errors[0]
    place = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid" or not place:
        text = "the body is no JSON object; send one, with Content-Type: application/json"
        return ApiError(400, text, code="invalid_json")
    name = str(place[0])
    if first["type"] == "missing":
        return bad_field(name, "is missing", "missing_required_parameter")
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place[1:])
    if name in _UNIONS:
        return bad_field(name, _UNIONS[name], "invalid_type")
    text = f"{name}{path}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return ApiError(400, text, param=name, code="invalid_type")


Endpoint = Literal["chat.completion", "text_completion"]
"""Kind of a response, as its field `object` says."""
