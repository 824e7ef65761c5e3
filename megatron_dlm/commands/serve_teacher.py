"""Give a teacher's most likely tokens and responses over HTTP, for runs with --teacher-url.

megatron-dlm serve-teacher --load Qwen/Qwen3-32B --teacher-precision bf16 --host 0.0.0.0
torchrun --nproc-per-node 8 -m megatron_dlm serve-teacher --load hf/teacher \
    --tensor-model-parallel-size 4

Every replica of the teacher listens at a port of its own; a run takes the addresses of several
servers. They run until SIGTERM or SIGINT (Ctrl-C), answer what waits, and end with status 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from megatron_dlm.commands import parse_command
from megatron_dlm.config import Config, validate_inference
from megatron_dlm.entry import world_size
from megatron_dlm.errors import bad_value
from megatron_dlm.extras import check_installed
from megatron_dlm.serving.options import ServeTeacherArguments as Arguments
from megatron_dlm.terminal import say
from megatron_dlm.training.model_source import ModelSource, open_model_source

if TYPE_CHECKING:
    from megatron_dlm.serving.teacher_queue import TeacherQueue


def main(argv: Sequence[str]) -> int:
    """Parse, check, load, serve."""
    arguments = parse_command("serve-teacher", Arguments, argv)
    for package in ("fastapi", "prometheus_client", "uvicorn"):
        check_installed(package, "command", "serve-teacher")
    config, source = _resolved(arguments)
    options = arguments.server
    # Imported only now, because it takes seconds.
    from megatron_dlm.parallel import initialized
    from megatron_dlm.serving.http_process import stopping_at_signals
    from megatron_dlm.serving.teacher_server import serve_teacher

    def on_ranks(queue: TeacherQueue) -> ExitStack:
        def stop() -> None:
            queue.stopping = True

        stack = ExitStack()
        stack.enter_context(stopping_at_signals(stop))
        return stack

    def announce(urls: Sequence[str]) -> None:
        say(f"serving the teacher {source.path} at {' '.join(urls)}")
        say(f"train with --teacher-url {' '.join(urls)} --divergence-top-k 16")

    with initialized(config):
        serve_teacher(
            source,
            config,
            options,
            address="127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host,
            announce=announce,
            is_over=lambda queue: queue.stopping and queue.is_idle,
            on_ranks=on_ranks,
        )
    return 0


def _resolved(arguments: Arguments) -> tuple[Config, ModelSource]:
    """A run's configuration of which the teacher is built, and its weights.

    Raises:
        UserError: Anything that could not work.
    """
    model = arguments.model
    if model.load is None:
        raise bad_value("--load", None, "there is no teacher", "name a model or run folder")
    source = open_model_source(model.load, "--load", model.verify_checkpoint)
    if not source.is_autoregressive:
        problem = "is a diffusion model; the teacher has to be autoregressive"
        raise bad_value("--load", model.load, problem, "name an autoregressive model's folder")
    config = Config(parallel=arguments.parallel).changed(
        load=model.load,
        teacher_precision=model.teacher_precision,
        micro_batch_size=model.micro_batch_size,
        max_tokens_per_micro_batch=model.max_tokens_per_micro_batch,
        divergence_chunk_size=model.divergence_chunk_size,
        max_running_requests=model.max_running_requests,
        max_total_tokens=model.max_total_tokens,
        chunked_prefill_size=model.chunked_prefill_size,
    )
    config = config.of_teacher()
    validate_inference(config, world_size(), source.architecture)
    return config, source
