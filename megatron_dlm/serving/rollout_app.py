"""The HTTP side of the rollout server: the part of SGLang's native API that rollouts need.

Paths, fields and responses are those of SGLang 0.5.23. Beside them, `/server_info` has
`megatron_dlm`, what decides a response's tokens, and `meta_info` of a response has `denoising`: at
which step each token was kept, and what was decoded after the response's end.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import ASGIApp

from megatron_dlm import __version__
from megatron_dlm.errors import UserError
from megatron_dlm.rollout.external.weight_group import Bucket
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.serving.api_error import ApiError, bad_field
from megatron_dlm.serving.app import Gate, answer_errors, unless_disconnected
from megatron_dlm.serving.decoding_thread import stopping_error
from megatron_dlm.serving.metrics import Metrics
from megatron_dlm.serving.options import RolloutServerConfig
from megatron_dlm.serving.prompts import Limits
from megatron_dlm.serving.rollout_queue import Change, Decoded, Request, RolloutQueue
from megatron_dlm.serving.rollout_requests import (
    AbortRequest,
    BeginWeightUpdate,
    ContinueGeneration,
    DestroyWeightsUpdateGroup,
    EndWeightUpdate,
    GenerateRequest,
    InitWeightsUpdateGroup,
    PauseGeneration,
    SamplingParams,
    UpdateFromDisk,
    UpdateFromDistributed,
    UpdateWeightVersion,
    read_draws,
)
from megatron_dlm.serving.served_weights import ServedWeights
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Prompt, Trajectory

OPEN_PATHS = frozenset({"/health", "/health_generate"})
"""Paths that need no key."""


@dataclass(frozen=True)
class RolloutModel:
    """What is served.

    Attributes:
        path: The folder it was loaded from.
        description: What decides the tokens of a response (`megatron_dlm` of `/server_info`).
        generation: Settings of requests.
        special_tokens: Of the model.
        limits: Of prompts and responses.
        decode: Text of tokens.
    """

    path: str
    description: dict[str, Any]
    generation: GenerationConfig
    special_tokens: SpecialTokens
    limits: Limits
    decode: Callable[[list[int]], str]


class RolloutApi:
    """Answers requests with a queue; all methods run in the thread of HTTP.

    Args:
        model: What is served.
        queue: Decodes.
        weights: Of the model.
    """

    def __init__(self, model: RolloutModel, queue: RolloutQueue, weights: ServedWeights) -> None:
        self._model = model
        self._queue = queue
        self._weights = weights
        self._numbers = itertools.count()

    def health(self) -> Response:
        """200 while requests are taken, 503 while the server stops."""
        if self._queue.stopping:
            raise stopping_error()
        return Response()

    def model_info(self) -> dict[str, Any]:
        """The model and the version of its weights."""
        config = self._model.description["hf_config"]
        return {
            "model_path": self._model.path,
            "tokenizer_path": self._model.path,
            "is_generation": True,
            "weight_version": self._weights.version,
            "load_format": "auto",
            "model_type": config["model_type"],
            "architectures": config["architectures"],
        }

    def server_info(self) -> dict[str, Any]:
        """How the server decodes; see `RolloutModel.description`."""
        generation, limits = self._model.generation, self._model.limits
        return {
            "model_path": self._model.path,
            "dtype": self._model.description["dtype"],
            "tp_size": 1,
            "dp_size": 1,
            "pp_size": 1,
            "context_length": limits.positions,
            "max_running_requests": generation.max_running_requests,
            "dllm_algorithm": None,
            "dllm_algorithm_config": None,
            "weight_version": self._weights.version,
            "version": f"megatron-dlm {__version__}",
            "megatron_dlm": self._model.description,
        }

    async def generate(self, request: HttpRequest, body: GenerateRequest) -> Response:
        """Decode one response to each prompt."""
        if self._queue.stopping:
            raise stopping_error()
        is_list, prompts = body.prompts()
        params, names = body.of_each(len(prompts))
        began = time.monotonic()
        requests = []
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Decoded]] = [loop.create_future() for _ in prompts]
        parts = zip(prompts, params, names, futures, strict=True)
        for token_ids, sampling, name, future in parts:
            name = uuid.uuid4().hex if name is None else name
            requests.append(self._request(token_ids, sampling, name, _setter(loop, future)))
        for one in requests:
            self._queue.submit(one)
        try:
            decoded = await unless_disconnected(request, _all(futures))
        finally:
            for one in requests:
                one.cancelled = True
        answers = [
            self._answer(one, result, time.monotonic() - began)
            for one, result in zip(requests, decoded, strict=True)
        ]
        return JSONResponse(answers if is_list else answers[0])

    async def change(self, apply: Callable[[], Any]) -> None:
        """Do something while nothing is in decoding.

        Raises:
            ApiError: It failed.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._queue.submit(Change(apply, _setter(loop, future)))
        try:
            await future
        except (UserError, ValueError) as error:
            raise ApiError(400, str(error)) from error

    async def update_from_disk(self, body: UpdateFromDisk) -> None:
        """Load a folder's weights."""
        self._abort_before(body.abort_all_requests)
        await self.change(lambda: self._weights.load_folder(body.model_path, body.weight_version))

    async def begin_update(self) -> None:
        """Take buckets from now on."""
        await self.change(self._weights.begin_update)

    async def end_update(self) -> None:
        """Take no more buckets."""
        await self.change(self._weights.end_update)

    async def update_from_distributed(self, body: UpdateFromDistributed) -> None:
        """Take tensors from a group."""
        self._abort_before(body.abort_all_requests)
        bucket = Bucket(body.names, body.dtypes, body.shapes)
        await self.change(
            lambda: self._weights.receive(
                body.group_name, bucket, body.load_format is not None, body.weight_version
            )
        )

    async def join(self, body: InitWeightsUpdateGroup) -> None:
        """Meet the process that sends weights, in a thread: the others may take their time."""
        await asyncio.to_thread(
            self._weights.join,
            body.group_name,
            body.master_address,
            body.master_port,
            body.rank_offset,
            body.world_size,
            body.backend,
        )

    async def leave(self, body: DestroyWeightsUpdateGroup) -> None:
        """Leave a group."""
        await self.change(lambda: self._weights.leave(body.group_name))

    async def flush(self) -> None:
        """Forget keys and values of finished responses."""
        await self.change(self._weights.flush)

    async def name_version(self, body: UpdateWeightVersion) -> None:
        """Give the weights another name."""
        self._abort_before(body.abort_all_requests)

        def apply() -> None:
            self._weights.version = body.new_version

        await self.change(apply)

    def abort(self, body: AbortRequest) -> None:
        """End requests."""
        if body.abort_all or body.rid:
            self._queue.abort("" if body.abort_all else body.rid)

    def pause(self) -> None:
        """End requests, and begin no others until `resume`."""
        self._queue.paused = True
        self._queue.abort()

    def resume(self) -> None:
        """Begin requests again."""
        self._queue.resume()

    def _abort_before(self, wanted: bool) -> None:
        if wanted:
            self._queue.abort()

    def _request(
        self,
        token_ids: list[int],
        params: SamplingParams,
        name: str,
        notify: Callable[[Any], None],
    ) -> Request:
        """A request, checked.

        Raises:
            ApiError: It cannot be decoded.
        """
        tokens, limits = self._model.special_tokens, self._model.limits
        for token in token_ids:
            if token >= tokens.vocab_size or token == tokens.mask_token_id:
                what = "MASK" if token == tokens.mask_token_id else "not in the vocabulary"
                raise bad_field("input_ids", f"{token} is {what}")
        if len(token_ids) > limits.max_prompt_length:
            problem = f"{len(token_ids)} tokens are more than {limits.max_prompt_length}"
            raise bad_field("input_ids", f"{problem}, which this server takes")
        room = min(limits.positions - len(token_ids), limits.max_response_length)
        length = room if params.max_new_tokens is None else params.max_new_tokens
        if length > room:
            problem = f"{length} tokens are more than the {room} that there is room for"
            raise bad_field("max_new_tokens", problem)
        draws = read_draws(params, self._model.generation, tokens)
        index = next(self._numbers) if draws.sample_index is None else draws.sample_index
        prompt = Prompt(index, torch.tensor(token_ids), max_response_length=length)
        return Request(name, prompt, draws.generation, draws.seed, notify)

    def _answer(self, request: Request, decoded: Decoded, seconds: float) -> dict[str, Any]:
        trajectory = decoded.trajectory
        ids = [] if trajectory is None else trajectory.response_ids.tolist()
        meta: dict[str, Any] = {
            "id": request.name,
            "finish_reason": _finish_reason(trajectory),
            "prompt_tokens": len(request.prompt.token_ids),
            "completion_tokens": len(ids),
            "cached_tokens": 0,
            "weight_version": decoded.weight_version,
            "e2e_latency": seconds,
        }
        if trajectory is not None:
            meta["denoising"] = {
                "unmask_step": trajectory.unmask_step.tolist(),
                "tail_ids": trajectory.tail_ids.tolist(),
                "tail_unmask_step": trajectory.tail_unmask_step.tolist(),
                "denoising_forwards": trajectory.denoising_forwards,
                "total_forwards": trajectory.total_forwards,
            }
        return {"text": self._model.decode(ids), "output_ids": ids, "meta_info": meta}


def _finish_reason(trajectory: Trajectory | None) -> dict[str, Any]:
    if trajectory is None:
        return {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
    if trajectory.finish_reason == "eos":
        return {"type": "stop", "matched": int(trajectory.response_ids[-1])}
    return {"type": "length", "length": len(trajectory.response_ids)}


def _setter(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any]) -> Callable[[Any], None]:
    """Resolves a future of the loop from another thread, with a result or an error."""

    def resolve(outcome: Any) -> None:
        if future.done():
            return
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def notify(outcome: Any) -> None:
        with suppress(RuntimeError):  # the loop has ended, and its clients have gone
            loop.call_soon_threadsafe(resolve, outcome)

    return notify


async def _all(futures: list[asyncio.Future[Decoded]]) -> list[Decoded]:
    return [await future for future in futures]


def create_rollout_app(api: RolloutApi, options: RolloutServerConfig, metrics: Metrics) -> ASGIApp:
    """The application for an ASGI server."""
    app = FastAPI(title="megatron-dlm rollouts", docs_url=None, redoc_url=None)
    answer_errors(app)
    both = ["GET", "POST"]

    def done(message: str, **more: Any) -> dict[str, Any]:
        return {"success": True, "message": message, **more}

    @app.get("/health")
    @app.get("/health_generate")
    async def health() -> Response:
        return api.health()

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/model_info")
    @app.get("/get_model_info")
    async def model_info() -> dict[str, Any]:
        return api.model_info()

    @app.get("/server_info")
    @app.get("/get_server_info")
    async def server_info() -> dict[str, Any]:
        return api.server_info()

    @app.post("/generate")
    async def generate(request: HttpRequest, body: GenerateRequest) -> Response:
        return await api.generate(request, body)

    @app.post("/abort_request")
    async def abort_request(body: AbortRequest) -> Response:
        api.abort(body)
        return Response()

    @app.api_route("/flush_cache", methods=both)
    async def flush_cache() -> Response:
        await api.flush()
        return PlainTextResponse("Cache flushed.\n")

    @app.post("/pause_generation")
    async def pause_generation(body: PauseGeneration) -> dict[str, Any]:
        api.pause()
        return {"message": "Generation paused successfully.", "status": "ok"}

    @app.post("/continue_generation")
    async def continue_generation(body: ContinueGeneration) -> dict[str, Any]:
        api.resume()
        return {"message": "Generation continued successfully.", "status": "ok"}

    @app.post("/update_weights_from_disk")
    async def update_weights_from_disk(body: UpdateFromDisk) -> dict[str, Any]:
        await api.update_from_disk(body)
        return done("Succeeded to update model weights.", num_paused_requests=0)

    @app.post("/init_weights_update_group")
    async def init_weights_update_group(body: InitWeightsUpdateGroup) -> dict[str, Any]:
        await api.join(body)
        return done("Succeeded to initialize custom process group.")

    @app.post("/begin_weight_update")
    async def begin_weight_update(body: BeginWeightUpdate) -> dict[str, Any]:
        await api.begin_update()
        return done("Success")

    @app.post("/end_weight_update")
    async def end_weight_update(body: EndWeightUpdate) -> dict[str, Any]:
        await api.end_update()
        return done("Success")

    @app.post("/update_weights_from_distributed")
    async def update_weights_from_distributed(body: UpdateFromDistributed) -> dict[str, Any]:
        await api.update_from_distributed(body)
        return done("Succeeded to update parameter online.")

    @app.post("/destroy_weights_update_group")
    async def destroy_weights_update_group(body: DestroyWeightsUpdateGroup) -> dict[str, Any]:
        await api.leave(body)
        return done("Succeeded to destroy custom process group.")

    @app.post("/update_weight_version")
    async def update_weight_version(body: UpdateWeightVersion) -> dict[str, Any]:
        await api.name_version(body)
        return done(f"Weight version updated to {body.new_version}", new_version=body.new_version)

    @app.post("/update_weights_from_tensor")
    async def update_weights_from_tensor() -> Response:
        text = "pickled tensors are not read; use /update_weights_from_distributed or _from_disk"
        raise ApiError(400, text, code="unsupported")

    return Gate(app, options, metrics, lambda path: path not in OPEN_PATHS)
