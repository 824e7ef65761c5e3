"""Options of the server."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Annotated

from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.options import InferenceArguments
from megatron_dlm.ranges import ABOVE_ZERO, AT_LEAST_ONE, AT_LEAST_ZERO, Range

API_KEY_VARIABLE = "MEGATRON_DLM_API_KEY"


@dataclass(frozen=True)
class HttpConfig:
    """Server: where it listens, and its limits."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for every address of this machine."""

    port: Annotated[int, Range(0, 65535)] = 8000
    """Port to listen at; 0 takes a free one and prints it."""

    api_key: str | None = None
    """Key that requests have to carry (Authorization: Bearer KEY), but for /health. Other users of
    the machine see arguments of a command: the variable MEGATRON_DLM_API_KEY does the same
    unseen."""

    max_request_bytes: Annotated[int, AT_LEAST_ONE] = 8 << 20
    """Longest body of a request."""

    request_timeout_s: Annotated[float, ABOVE_ZERO] = 600.0
    """Seconds after which a request that is not answered is given up with status 504."""

    shutdown_timeout_s: Annotated[float, AT_LEAST_ZERO] = 60.0
    """Seconds that requests in decoding have after SIGTERM or SIGINT; new ones are refused with
    status 503 meanwhile."""

    @property
    def key(self) -> str | None:
        """The key that requests need; None: none.

        Raises:
            UserError: It is empty.
        """
        key = os.environ.get(API_KEY_VARIABLE) if self.api_key is None else self.api_key
        if key == "":
            source = API_KEY_VARIABLE if self.api_key is None else "--api-key"
            raise bad_value(source, key, "is empty", "write a key, or leave it out")
        return key


@dataclass(frozen=True)
class ServerConfig(HttpConfig):
    """Server: where it listens, and its limits."""

    served_model_name: str | None = None
    """Name of the model in requests (default: the last part of --load)."""

    max_waiting_requests: Annotated[int, AT_LEAST_ZERO] = 256
    """Responses that may wait for a slot, beside --max-running-requests in decoding; further
    requests are refused with status 429."""

    max_choices: Annotated[int, AT_LEAST_ONE] = 16
    """Most responses to one request: prompts times n."""


@dataclass(frozen=True)
class RolloutServerConfig(HttpConfig):
    """Server: where it listens, and its limits."""

    port: Annotated[int, Range(0, 65535)] = 30000
    """Port to listen at; 0 takes a free one and prints it."""

    request_timeout_s: Annotated[float, ABOVE_ZERO] = 3600.0
    """Seconds after which a request that is not answered is given up with status 504."""


@dataclass(frozen=True)
class ServeArguments(InferenceArguments):
    """Answer requests over HTTP."""

    server: ServerConfig = field(default_factory=ServerConfig)


@dataclass(frozen=True)
class RolloutServerArguments(InferenceArguments):
    """Decode the rollouts of training runs over HTTP."""

    server: RolloutServerConfig = field(default_factory=RolloutServerConfig)
