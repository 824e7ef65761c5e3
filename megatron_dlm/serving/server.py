"""A server process: the model in the main thread, HTTP in another one."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_dlm.data.tokenizer import load_tokenizer, special_tokens_of
from megatron_dlm.evaluation.generation import load_frozen_model
from megatron_dlm.evaluation.options import InferenceSetup
from megatron_dlm.parallel import ParallelGroups, initialized
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.serving.app import Api, ServedModel, create_app
from megatron_dlm.serving.http_process import answering, listening, stopping_at_signals
from megatron_dlm.serving.metrics import Metrics
from megatron_dlm.serving.options import ServerConfig
from megatron_dlm.serving.prompts import Limits, PromptReader
from megatron_dlm.serving.scheduler import Scheduler
from megatron_dlm.terminal import say

TOKENS_PER_SLOT = 4096
"""Positions in the KV cache for each response in decoding but one, which has those of the longest
request, unless --max-total-tokens says otherwise. A response that needs more waits for others."""


def serve(setup: InferenceSetup, options: ServerConfig) -> int:
    """Serve a model until SIGTERM or SIGINT; returns the exit status.

    Raises:
        UserError: The address cannot be listened at, or the model cannot be loaded.
    """
    [generation] = setup.settings().values()
    options.key  # noqa: B018 - refused before long work
    with listening(options) as listener:
        tokenizer = load_tokenizer(setup.tokenizer_folder)
        special_tokens = special_tokens_of(
            tokenizer, setup.source.architecture, setup.tokenizer_folder
        )
        limits = Limits.of(setup)
        metrics = Metrics()
        with initialized(setup.config):
            engine = RolloutEngine(
                load_frozen_model(setup),
                generation=generation,
                special_tokens=special_tokens,
                seed=setup.config.data.seed,
                groups=ParallelGroups.from_parallel_state(),
            )
            slots = generation.max_running_requests
            batch = engine.open(
                slots, cache_lengths(generation, limits), limits.max_response_length
            )

            def decode(token_ids: list[int]) -> str:
                return str(tokenizer.decode(token_ids, skip_special_tokens=True))

            scheduler = Scheduler(batch, engine.work, decode, metrics, options.shutdown_timeout_s)
            reader = PromptReader(
                setup.config.template.chat_template_kwargs, tokenizer, special_tokens, limits
            )
            name = options.served_model_name or Path(str(setup.options.load)).resolve().name
            model = ServedModel(name, generation, setup.config.data.seed, reader)
            api = Api(model, scheduler, options, metrics)
            app = create_app(api, options, metrics)
            stop = scheduler.stop
            with stopping_at_signals(stop), answering(app, listener, stop), engine.evaluating():
                say(_greeting(name, options, listener.getsockname()[1]))
                scheduler.run()
    return 0


def cache_lengths(generation: GenerationConfig, limits: Limits) -> list[int]:
    """Positions that the cache is made for, of as many sequences as there are slots."""
    longest = limits.max_prompt_length + limits.max_response_length
    if generation.block_size is not None:
        blocks = -(-longest // generation.block_size)
        longest = min(blocks * generation.block_size, limits.positions)
    others = generation.max_running_requests - 1
    return [longest] + [min(longest, TOKENS_PER_SLOT)] * others


def _greeting(name: str, options: ServerConfig, port: int) -> str:
    """The address, and a command that tries it."""
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    body = {"model": name, "messages": [{"role": "user", "content": "What is 17 + 25?"}]}
    key = "" if options.key is None else "-H 'Authorization: Bearer KEY' "
    return (
        f"serving {name} at {url}\n"
        f"curl {url}/chat/completions {key}-H 'Content-Type: application/json' \\\n"
        f"  -d '{json.dumps(body)}'"
    )
