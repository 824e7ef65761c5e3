"""Decode the rollouts of training runs over HTTP, by the part of SGLang's native API they need.

megatron-dlm rollout-server --load hf/qwen3_8b --block-size 4 --dynamic-threshold 0.9 --bf16
megatron-dlm train ... --rollout-engine sglang --rollout-engine-urls http://HOST:30000

A run replaces the weights before each rollout, so --load only has to be the same model. Decoding
options have to be the run's; docs/rollout-engines.md has what is compared. The server runs until
SIGTERM or SIGINT (Ctrl-C).
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dlm.commands import parse_command
from megatron_dlm.entry import world_size
from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.options import resolve_inference
from megatron_dlm.extras import check_installed
from megatron_dlm.serving.options import RolloutServerArguments as Arguments


def main(argv: Sequence[str]) -> int:
    """Parse, check, load, serve."""
    arguments = parse_command("rollout-server", Arguments, argv)
    if world_size() > 1:
        problem = "the server is one process, on one device; a run takes several servers"
        raise bad_value("WORLD_SIZE", world_size(), problem, "start one on each device")
    for package in ("fastapi", "prometheus_client", "uvicorn"):
        check_installed(package, "command", "rollout-server")
    setup = resolve_inference(arguments, 1)
    [generation] = setup.settings().values()
    if generation.is_autoregressive:
        problem = f"{setup.options.load} is decoded from left to right"
        raise bad_value("--decoding", "autoregressive", problem, "add --block-size")
    # Imported only now, because it takes seconds.
    from megatron_dlm.serving.rollout_server import serve_rollouts

    return serve_rollouts(setup, arguments.server)
