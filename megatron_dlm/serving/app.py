"""The HTTP side: OpenAI's endpoints, health and metrics."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as AnyHttpException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.serving.api_error import ApiError, bad_field
from megatron_dlm.serving.decoding_thread import stopping_error
from megatron_dlm.serving.jobs import Event, Failed, Finished, Job, Started
from megatron_dlm.serving.metrics import Metrics
from megatron_dlm.serving.options import HttpConfig, ServerConfig
from megatron_dlm.serving.prompts import PromptReader
from megatron_dlm.serving.requests import (
    ChatRequest,
    CompletionRequest,
    Endpoint,
    validation_error,
)
from megatron_dlm.serving.responses import DONE, Answer, stream_event
from megatron_dlm.serving.scheduler import Scheduler


@dataclass(frozen=True)
class ServedModel:
    """What is served.

    Attributes:
        name: In requests.
        generation: Settings of requests that name none.
        seed: Of the server; a request without a seed gets one made from it and its number.
        reader: Of prompts.
    """

    name: str
    generation: GenerationConfig
    seed: int
    reader: PromptReader


class Api:
    """Answers requests with a scheduler; all methods run in the thread of HTTP.

    Args:
        model: What is served.
        scheduler: Decodes.
        options: Limits and key.
        metrics: Counters.
    """

    def __init__(
        self, model: ServedModel, scheduler: Scheduler, options: ServerConfig, metrics: Metrics
    ) -> None:
        self._model = model
        self._scheduler = scheduler
        self._options = options
        self._metrics = metrics
        self._open_responses = 0
        self._numbers = count()
        self._created = int(time.time())

    def models(self) -> dict[str, Any]:
        """The list of models: the one that is served."""
        return {"object": "list", "data": [self.model(self._model.name)]}

    def model(self, name: str) -> dict[str, Any]:
        """The description of a model."""
        self._check_model(name)
        positions = self._model.reader.limits.positions
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "megatron-dlm",
            "max_model_len": positions,
        }

    def health(self) -> Response:
        """200 while requests are taken, 503 while the server stops."""
        if self._scheduler.stopping:
            raise stopping_error()
        return Response()

    def metrics(self) -> Response:
        """The counters in Prometheus's format."""
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def answer(
        self, request: Request, body: ChatRequest | CompletionRequest, endpoint: Endpoint
    ) -> Response:
        """Decode the responses to a request, and answer it at once or as a stream."""
        self._check_model(body.model)
        body.check()
        num_prompts, n = _num_prompts(body), body.n or 1
        num_choices = num_prompts * n
        if num_choices > self._options.max_choices:
            field = "n" if n > 1 else "prompt"
            problem = f"{num_choices} responses to one request are more than the server's limit of"
            raise bad_field(field, f"{problem} {self._options.max_choices}")
        generation = body.generation(self._model.generation)
        self._model.reader.check_size(body)
        self._check_room(num_choices)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        left, released = num_choices, False

        def take(event: Event) -> None:
            nonlocal left
            events.put_nowait(event)
            left -= isinstance(event, Finished)
            # Not when the client has read it all, which it may never do.
            if left == 0 or isinstance(event, Failed):
                release()

        def notify(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended, and its clients have gone
                loop.call_soon_threadsafe(take, event)

        job = Job(
            read=lambda: self._model.reader.read(body),
            n=n,
            generation=generation,
            seed=self._seed() if body.seed is None else body.seed,
            stops=body.stops,
            notify=notify,
        )
        deadline = loop.time() + self._options.request_timeout_s
        running = _Running(job, events, deadline)
        self._open_responses += num_choices

        def release() -> None:
            nonlocal released
            if not released:
                released = job.cancelled = True
                self._open_responses -= num_choices
                self._metrics.request_seconds.observe(time.monotonic() - job.submitted)

        self._scheduler.submit(job)
        streams = False
        try:
            started = await unless_disconnected(request, running.next())
            assert isinstance(started, Started)
            answer = Answer(endpoint, body.model, num_choices, started.prompt_tokens)
            if body.stream:
                streams = True
                return _EventStream(_events(answer, running, body.includes_usage), release)
            await unless_disconnected(request, _complete(answer, running))
            return JSONResponse(answer.body())
        finally:
            if not streams:
                release()

    def _seed(self) -> int:
        key = repr((self._model.seed, next(self._numbers))).encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")

    def _check_model(self, name: str) -> None:
        if name != self._model.name:
            text = f"the model {name!r} does not exist; this server has {self._model.name!r}"
            raise ApiError(404, text, param="model", code="model_not_found")

    def _check_room(self, num_choices: int) -> None:
        """Refuse a request that would wait for too many others."""
        if self._scheduler.stopping:
            raise stopping_error()
        room = self._model.generation.max_running_requests + self._options.max_waiting_requests
        if num_choices > room:
            problem = f"{num_choices} responses are more than the {room} that this server holds"
            raise ApiError(400, f"n: {problem}", param="n")
        if self._open_responses + num_choices > room:
            raise ApiError(
                429,
                f"{self._open_responses} responses run or wait, and the server holds {room}",
                code="queue_full",
                retry_after=1,
            )


class _Running:
    """The events of a job, up to a deadline of the loop's clock."""

    def __init__(self, job: Job, events: asyncio.Queue[Event], deadline: float) -> None:
        self._job = job
        self._events = events
        self._deadline = deadline

    async def next(self) -> Event:
        """The next event.

        Raises:
            ApiError: The job has failed, or it is late.
        """
        try:
            async with asyncio.timeout_at(self._deadline):
                event = await self._events.get()
        except TimeoutError:
            self._job.cancelled = True
            raise ApiError(504, "the request took too long", code="timeout") from None
        if isinstance(event, Failed):
            raise event.error
        return event


async def _complete(answer: Answer, running: _Running) -> None:
    """Wait for all responses."""
    while not answer.is_complete:
        event = await running.next()
        assert not isinstance(event, Started | Failed)
        answer.add(event)


class _EventStream(StreamingResponse):
    """A stream of server-sent events.

    Args:
        events: Their bytes.
        on_end: Called however it ends.
    """

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them, as ASGI has it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def _events(answer: Answer, running: _Running, with_usage: bool) -> AsyncIterator[bytes]:
    """The events of a stream; cancelled when the client goes."""
    try:
        for piece in answer.first_pieces():
            yield stream_event(piece)
        while not answer.is_complete:
            event = await running.next()
            assert not isinstance(event, Started | Failed)
            if isinstance(event, Finished):
                answer.add(event)
            yield stream_event(answer.piece(event))
        if with_usage:
            yield stream_event(answer.usage_piece())
        yield DONE
    except ApiError as error:
        yield stream_event(error.body())


async def unless_disconnected(request: Request, work: Any) -> Any:
    """The result of a coroutine, which is cancelled if the client goes.

    Raises:
        ApiError: The client has gone; nobody reads it.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has gone", code="client_disconnected")
        return task.result()
    finally:
        for future in (task, gone):
            future.cancel()


def _num_prompts(body: ChatRequest | CompletionRequest) -> int:
    if isinstance(body, ChatRequest) or isinstance(body.prompt, str):
        return 1
    return 1 if body.prompt and isinstance(body.prompt[0], int) else len(body.prompt)


def error_response(error: ApiError) -> Response:
    """The response that an error makes."""
    # In ASCII: a message may quote half of a surrogate pair, which UTF-8 does not have.
    content = json.dumps(error.body())
    return Response(content, error.status, error.headers(), "application/json")


class Gate:
    """Before any endpoint: the key, the size of bodies, and a count of what was answered.

    Args:
        app: Answers the requests that it lets pass.
        options: The limits.
        metrics: Counters.
        needs_key: Whether requests to a path have to carry the key.
    """

    def __init__(
        self,
        app: ASGIApp,
        options: HttpConfig,
        metrics: Metrics,
        needs_key: Callable[[str], bool] = lambda path: path.startswith("/v1/"),
    ) -> None:
        self._app = app
        self._needs_key = needs_key
        self._max_bytes = options.max_request_bytes
        self._timeout_s = options.request_timeout_s
        key = options.key
        self._authorization = None if key is None else f"Bearer {key}".encode()
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size, is_late = 0, False
        # Of a client that does not read, too, for which a send would wait without end.
        deadline = asyncio.get_running_loop().time() + self._timeout_s

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                raise HTTPException(413, self._too_large().message)
            return message

        async def counted(message: Message) -> None:
            nonlocal is_late
            if message["type"] == "http.response.start":
                # Paths that are not ours would be labels without end.
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(route, message["status"]).inc()
            try:
                async with asyncio.timeout_at(deadline):
                    await send(message)
            except TimeoutError:
                is_late = True
                raise

        try:
            headers = dict(scope["headers"])
            self._check(scope["path"], headers)
        except ApiError as error:
            await error_response(error)(scope, receive, counted)
            return
        try:
            await self._app(scope, limited, counted)
        except Exception:
            if not is_late:
                raise

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._authorization is not None and self._needs_key(path):
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._authorization):
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        text = f"the body has more than {self._max_bytes} bytes"
        return ApiError(413, text, code="request_too_large")


_UNREADABLE = (
    "the body cannot be read: it is not in UTF-8, nests lists or objects too deeply, or has a"
    " number of thousands of digits; send plain JSON"
)


def answer_errors(app: FastAPI) -> None:
    """Let an application answer every error in the form that OpenAI's clients read."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return error_response(validation_error(list(error.errors())))

    @app.exception_handler(AnyHttpException)
    async def unrouted(request: Request, error: AnyHttpException) -> Response:
        if error.status_code == 400:  # FastAPI's, where the parser raises something else than usual
            return error_response(ApiError(400, _UNREADABLE, code="invalid_json"))
        text = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(ApiError(error.status_code, text))


def create_app(api: Api, options: ServerConfig, metrics: Metrics) -> ASGIApp:
    """The application for an ASGI server."""
    # Their pages load scripts from elsewhere.
    app = FastAPI(title="megatron-dlm", docs_url=None, redoc_url=None)

    answer_errors(app)

    @app.get("/health")
    async def health() -> Response:
        return api.health()

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return api.metrics()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return api.models()

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return api.model(name)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await api.answer(request, body, "chat.completion")

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await api.answer(request, body, "text_completion")

    return Gate(app, options, metrics)
