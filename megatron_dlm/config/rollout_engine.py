"""Options of rollouts by servers; see `groups`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_dlm.ranges import ABOVE_ZERO, AT_LEAST_ONE, AT_LEAST_ZERO


@dataclass(frozen=True)
class RolloutEngineConfig:
    """Rollout engine: what decodes, and servers that do it for the run."""

    rollout_engine: Literal["internal", "sglang"] = "internal"
    """What decodes rollouts: the training processes themselves (internal), or servers that speak
    SGLang's native API (sglang), to which the weights are sent before each rollout."""
    rollout_engine_urls: tuple[str, ...] = ()
    """Addresses of these servers (http://HOST:PORT), SGLang's or megatron-dlm rollout-server's;
    they share the prompts."""
    rollout_engine_weights: Literal["distributed", "disk"] = "distributed"
    """How weights come to the servers: broadcast from rank 0 in a process group with them
    (distributed), or written to a folder that they read (disk)."""
    rollout_engine_weights_path: str | None = None
    """Where that folder is made and removed again, on a disk that all hosts see (default: the run
    folder)."""
    rollout_engine_concurrency: Annotated[int, AT_LEAST_ONE] = 64
    """Requests of each data-parallel process to each server at once."""
    rollout_engine_timeout_s: Annotated[float, ABOVE_ZERO] = 1800.0
    """Seconds after which a request to a server is tried again."""
    rollout_engine_retries: Annotated[int, AT_LEAST_ZERO] = 5
    """Further tries of a request that a server does not answer, 1, 2, 4, ... up to 30 seconds
    apart."""
    max_rollout_staleness: Annotated[int, AT_LEAST_ZERO] = 0
    """Optimizer updates by which the weights of a rollout may be behind at its first update: so
    many before the end of a rollout batch, servers begin the next one (0: after the last)."""
