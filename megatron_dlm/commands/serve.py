"""Serve a checkpoint over HTTP, with OpenAI's API.

megatron-dlm serve --load hf/qwen3_8b_sdar --bf16
megatron-dlm serve --load runs/mine --port 9000 --dynamic-threshold 0.7 --max-running-requests 32

Any client of OpenAI's API works with it; docs/serving.md lists what it offers. Decoding options are
the defaults of requests. The server runs until SIGTERM or SIGINT (Ctrl-C), finishes the requests in
decoding, and ends with status 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dlm.commands import parse_command
from megatron_dlm.entry import world_size
from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.options import resolve_inference
from megatron_dlm.extras import check_installed
from megatron_dlm.serving.options import ServeArguments as Arguments


def main(argv: Sequence[str]) -> int:
    """Parse, check, load, serve."""
    arguments = parse_command("serve", Arguments, argv)
    if world_size() > 1:
        problem = "the server is one process, on one device"
        raise bad_value("WORLD_SIZE", world_size(), problem, "start it without torchrun")
    for package in ("fastapi", "prometheus_client", "uvicorn"):
        check_installed(package, "command", "serve")
    template = arguments.template
    for name in ("prompt_suffix_by_domain", "max_response_length_by_domain"):
        if value := getattr(template, name):
            flag = "--" + name.replace("_", "-")
            raise bad_value(flag, value, "a request has no domain", "drop it")
    setup = resolve_inference(arguments, 1)
    setup.settings()
    # Imported only now, because it takes seconds.
    from megatron_dlm.serving.server import serve

    return serve(setup, arguments.server)
