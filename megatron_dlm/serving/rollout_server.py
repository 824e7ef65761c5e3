"""The rollout server: the model in the main thread, HTTP in another one."""

from __future__ import annotations

from pathlib import Path

from megatron_dlm.data.tokenizer import load_tokenizer, special_tokens_of
from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.generation import load_frozen_model
from megatron_dlm.evaluation.options import InferenceSetup
from megatron_dlm.parallel import ParallelGroups, initialized
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.external.settings import described
from megatron_dlm.serving.http_process import answering, listening, stopping_at_signals
from megatron_dlm.serving.metrics import Metrics
from megatron_dlm.serving.options import RolloutServerConfig
from megatron_dlm.serving.prompts import Limits
from megatron_dlm.serving.rollout_app import RolloutApi, RolloutModel, create_rollout_app
from megatron_dlm.serving.rollout_queue import RolloutQueue
from megatron_dlm.serving.served_weights import ServedWeights
from megatron_dlm.serving.server import cache_lengths
from megatron_dlm.terminal import say


def serve_rollouts(setup: InferenceSetup, options: RolloutServerConfig) -> int:
    """Decode rollouts until SIGTERM or SIGINT; returns the exit status.

    Raises:
        UserError: The address cannot be listened at, or the model cannot be loaded.
    """
    [generation] = setup.settings().values()
    options.key  # noqa: B018 - refused before long work
    readable = None if options.weights_path is None else Path(options.weights_path)
    if readable is not None and not readable.is_dir():
        problem, remedy = "there is no such folder", "make it, or name one that runs write to"
        raise bad_value("--weights-path", options.weights_path, problem, remedy)
    architecture = setup.source.architecture
    with listening(options) as listener:
        tokenizer = load_tokenizer(setup.tokenizer_folder)
        special_tokens = special_tokens_of(tokenizer, architecture, setup.tokenizer_folder)
        limits, metrics = Limits.of(setup), Metrics()
        with initialized(setup.config):
            network = load_frozen_model(setup)
            engine = RolloutEngine(
                network,
                generation=generation,
                special_tokens=special_tokens,
                seed=setup.config.data.seed,
                groups=ParallelGroups.from_parallel_state(),
            )
            lengths = cache_lengths(generation, limits)
            batch = engine.open(
                generation.max_running_requests, lengths, limits.max_response_length
            )
            weights = ServedWeights(network, architecture, batch.forget, readable)

            def decode(token_ids: list[int]) -> str:
                return str(tokenizer.decode(token_ids, skip_special_tokens=True))

            dtype = next(network.parameters()).dtype
            description = described(architecture, generation, special_tokens, dtype)
            model = RolloutModel(
                path=str(Path(str(setup.options.load)).resolve()),
                description=description,
                generation=generation,
                special_tokens=special_tokens,
                limits=limits,
                decode=decode,
            )
            queue = RolloutQueue(
                batch, engine.work, metrics, lambda: weights.version, options.shutdown_timeout_s
            )
            app = create_rollout_app(RolloutApi(model, queue, weights), options, metrics)
            stop = queue.stop
            with stopping_at_signals(stop), answering(app, listener, stop), engine.evaluating():
                say(_greeting(model.path, options, listener.getsockname()[1]))
                queue.run()
    return 0


def _greeting(path: str, options: RolloutServerConfig, port: int) -> str:
    """The address, as a run takes it."""
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    return (
        f"rollouts with {path} at {url}\n"
        f"megatron-dlm train ... --rollout-engine sglang --rollout-engine-urls {url}"
    )
