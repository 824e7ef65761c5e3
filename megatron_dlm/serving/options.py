"""Options of the server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from megatron_dlm.api_key import API_KEY_VARIABLE, key_of_environment
from megatron_dlm.config import CheckpointOptions, DecodingConfig, ParallelConfig
from megatron_dlm.config.groups import TrainingConfig
from megatron_dlm.config.teacher_options import TeacherPrecision
from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.options import InferenceArguments
from megatron_dlm.ranges import ABOVE_ZERO, AT_LEAST_ONE, AT_LEAST_ZERO, Range


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

    @property
    def key(self) -> str | None:
        """The key that requests need; None: none.

        Raises:
            UserError: It is empty.
        """
        key = key_of_environment() if self.api_key is None else self.api_key
        if key == "":
            source = API_KEY_VARIABLE if self.api_key is None else "--api-key"
            raise bad_value(source, key, "is empty", "write a key, or leave it out")
        return key


@dataclass(frozen=True)
class DecodingServerConfig(HttpConfig):
    """Server: where it listens, and its limits."""

    shutdown_timeout_s: Annotated[float, AT_LEAST_ZERO] = 60.0
    """Seconds that requests in decoding have after SIGTERM or SIGINT; new ones are refused with
    status 503 meanwhile."""


@dataclass(frozen=True)
class ServerConfig(DecodingServerConfig):
    """Server: where it listens, and its limits."""

    served_model_name: str | None = None
    """Name of the model in requests (default: the last part of --load)."""

    max_waiting_requests: Annotated[int, AT_LEAST_ZERO] = 256
    """Responses that may wait for a slot, beside --max-running-requests in decoding; further
    requests are refused with status 429."""

    max_choices: Annotated[int, AT_LEAST_ONE] = 16
    """Most responses to one request: prompts times n."""


@dataclass(frozen=True)
class RolloutServerConfig(DecodingServerConfig):
    """Server: where it listens, and its limits."""

    port: Annotated[int, Range(0, 65535)] = 30000
    """Port to listen at; 0 takes a free one and prints it."""

    weights_path: str | None = None
    """Folder below which /update_weights_from_disk may read weights, that of the run's
    --rollout-engine-weights-path (default: such requests are refused)."""

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


@dataclass(frozen=True)
class TeacherServerConfig(HttpConfig):
    """Server: where it listens, and its limits."""

    port: Annotated[int, Range(0, 65535)] = 8100
    """Port to listen at; 0 takes a free one and prints it. Several replicas of the teacher listen
    at this and the following ones."""

    max_waiting_texts: Annotated[int, AT_LEAST_ONE] = 65536
    """Texts and prompts that may wait for the teacher; further requests are refused with status
    429."""


@dataclass(frozen=True)
class TeacherModelConfig(CheckpointOptions):
    """Model: the teacher's weights, and how texts are laid into rows."""

    teacher_precision: TeacherPrecision = "fp32"
    """Precision that it computes in; fp8: weights of linear layers and experts in e4m3 with a scale
    for each output, half of bf16's memory, the rest in bf16."""

    micro_batch_size: Annotated[int, AT_LEAST_ONE] = TrainingConfig.micro_batch_size
    """Texts of a row, the unit of a forward pass. With 1, results do not depend on what else is
    asked."""

    max_tokens_per_micro_batch: Annotated[int | None, AT_LEAST_ONE] = None
    """Lay texts into as few rows of at most this many tokens as possible, instead."""

    divergence_chunk_size: Annotated[int | None, AT_LEAST_ONE] = None
    """Tokens whose logits are in memory at a time (default: as many as memory allows)."""

    max_running_requests: Annotated[int, AT_LEAST_ONE] = DecodingConfig.max_running_requests
    """Prompts that a replica answers at once, if the KV cache has room for them; it is there only
    while prompts are answered."""

    max_total_tokens: Annotated[int | None, AT_LEAST_ONE] = None
    """Tokens that this KV cache has room for (default: enough for --max-running-requests, up to
    80 % of free GPU memory)."""

    chunked_prefill_size: Annotated[int, AT_LEAST_ONE] = DecodingConfig.chunked_prefill_size
    """Most prompt tokens of a forward that answers prompts."""


@dataclass(frozen=True)
class ServeTeacherArguments:
    """Give the most likely tokens of texts, and responses to prompts, over HTTP."""

    model: TeacherModelConfig = field(default_factory=TeacherModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    server: TeacherServerConfig = field(default_factory=TeacherServerConfig)
