"""The HTTP side of a teacher's server: who it is, targets of texts, responses to prompts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp

from megatron_dlm.activity import ACTIVITY
from megatron_dlm.errors import UserError
from megatron_dlm.models.architecture import Architecture
from megatron_dlm.serving.api_error import ApiError
from megatron_dlm.serving.app import Gate, answer_errors
from megatron_dlm.serving.metrics import Metrics
from megatron_dlm.serving.options import TeacherServerConfig
from megatron_dlm.serving.teacher_queue import Item, TeacherQueue, Wanted
from megatron_dlm.serving.teacher_requests import ResponsesRequest
from megatron_dlm.teacher.wire import (
    FINGERPRINT_HEADER,
    HEAD_PATH,
    IDENTITY_PATH,
    RESPONSES_PATH,
    TARGETS_PATH,
    TeacherIdentity,
    TeacherRow,
    pack_head,
    pack_targets,
    unpack_texts,
)

MOST_VALUES = 1 << 26
"""Probabilities of an answer: the process that gives all of them holds them at once."""

WaitSeconds = Annotated[float | None, Query(ge=0)]
"""How long a client waits for an answer; then it hears that the teacher is at work."""


class TeacherApi:
    """Answers requests with a queue; all methods run in the thread of HTTP.

    Args:
        identity: Of the teacher.
        architecture: Of the teacher.
        queue: Where texts wait for it.
        options: Limits.
        cache_tokens: Of a prompt and its longest response (`most_tokens`); None: any number.
    """

    def __init__(
        self,
        identity: TeacherIdentity,
        architecture: Architecture,
        queue: TeacherQueue,
        options: TeacherServerConfig,
        cache_tokens: int | None = None,
    ) -> None:
        self._identity, self._queue, self._options = identity, queue, options
        self._vocab_size = architecture.vocab_size
        self._positions = architecture.max_position_embeddings
        self._cache_tokens = cache_tokens

    def identity(self) -> dict[str, Any]:
        """Who the teacher is."""
        return self._identity.to_json()

    def health(self) -> Response:
        """200 while requests are taken, 503 while the server stops."""
        if self._queue.stopping:
            raise _stopping()
        return Response()

    async def targets(self, request: Request, ahead: bool, wait_s: float | None) -> Response:
        """The most likely tokens of texts; of texts sent ahead, only whether they are known."""
        self._check_teacher(request)
        try:
            rows, k = await asyncio.to_thread(unpack_texts, await request.body())
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        self._check(rows, k)
        if ahead:
            if not self._queue.stopping:
                self._queue.send_ahead(rows, k)
            return Response(status_code=202)
        targets = await self._computed(rows, k, wait_s)
        if targets is None:
            return self._at_work()
        body = await asyncio.to_thread(pack_targets, targets)
        return Response(body, media_type="application/octet-stream")

    async def responses(
        self, request: Request, body: ResponsesRequest, wait_s: float | None
    ) -> Response:
        """Responses to prompts."""
        self._check_teacher(request)
        prompts, drawing = body.read(self._vocab_size, self._positions, self._cache_tokens)
        responses = await self._computed(prompts, drawing, wait_s)
        return self._at_work() if responses is None else JSONResponse({"responses": responses})

    async def _computed(
        self, items: Sequence[Item], wanted: Wanted, wait_s: float | None
    ) -> list[Any] | None:
        """What the teacher makes of this; None if that takes longer than the client waits.

        A server that stops still gives the answers that it has begun.
        """
        queue, most = self._queue, self._options.request_timeout_s
        if queue.stopping and not queue.knows(items, wanted):
            raise _stopping()
        if queue.waiting > self._options.max_waiting_texts:
            raise ApiError(429, "too many texts wait", code="queue_full", retry_after=1)
        futures = [asyncio.wrap_future(future) for future in queue.ask(items, wanted)]
        began = time.monotonic()
        try:
            while True:
                left = began + most - time.monotonic()
                waits = left if wait_s is None else min(wait_s, left)
                await asyncio.wait(futures, timeout=waits, return_when=asyncio.FIRST_EXCEPTION)
                if all(future.done() for future in futures):
                    return [future.result() for future in futures]
                for future in futures:
                    if future.done():
                        future.result()  # the first error is the answer
                if time.monotonic() - began >= most:
                    raise ApiError(504, "the request took too long", code="timeout")
                if not queue.stopping:
                    return None
        except UserError as error:
            raise ApiError(400, str(error)) from error
        finally:
            for future in futures:
                future.cancel()

    def _at_work(self) -> Response:
        """The same request again gives the answer, later; how far the teacher is until then."""
        return JSONResponse({"progress": ACTIVITY.steps}, status_code=202)

    def _check_teacher(self, request: Request) -> None:
        """Refuse who expects another teacher."""
        own = self._identity
        if request.headers.get(FINGERPRINT_HEADER, own.computes) != own.computes:
            text = f"this server has the teacher {own.name} in {own.precision}, another one"
            raise ApiError(409, text, code="other_teacher")

    async def head(self, request: Request, first: int, last: int) -> Response:
        """Rows of the output layer, for clients that ask for hidden states."""
        self._check_teacher(request)
        if not 0 <= first < last <= self._vocab_size:
            problem = f"rows {first} to {last} are not among {self._vocab_size}"
            raise ApiError(400, problem, param="first")
        whole = await asyncio.shield(asyncio.wrap_future(self._queue.ask_head()))
        body = await asyncio.to_thread(pack_head, whole[first:last])
        return Response(body, media_type="application/octet-stream")

    def _check(self, rows: Sequence[TeacherRow], k: int) -> None:
        """Refuse what would end the process of the teacher."""
        texts = [text for row in rows for text in row.texts]
        if not texts:
            raise ApiError(400, "there is no text")
        if not 0 <= k < self._vocab_size:
            problem = f"k = {k} is no proper part of a vocabulary of {self._vocab_size}"
            raise ApiError(400, problem, param="k")
        if k * sum(map(len, texts)) > MOST_VALUES:
            problem = f"{k} tokens of each prediction are more than {MOST_VALUES} numbers together"
            raise ApiError(400, problem, param="k")
        for text in texts:
            if len(text.token_ids) > self._positions:
                problem = f"a text of {len(text.token_ids)} tokens is longer than the teacher's "
                raise ApiError(400, f"{problem}{self._positions} positions", param="lengths")
            if int(text.token_ids.min()) < 0 or int(text.token_ids.max()) >= self._vocab_size:
                problem = f"an id is outside the vocabulary of {self._vocab_size}"
                raise ApiError(400, problem, param="token_ids")


def _stopping() -> ApiError:
    return ApiError(503, "the server stops", code="stopping", retry_after=10)


def create_teacher_app(api: TeacherApi, options: TeacherServerConfig) -> ASGIApp:
    """The application for an ASGI server."""
    app = FastAPI(title="megatron-dlm teacher", docs_url=None, redoc_url=None)

    answer_errors(app)

    @app.get("/health")
    async def health() -> Response:
        return api.health()

    @app.get(IDENTITY_PATH)
    async def identity() -> dict[str, Any]:
        return api.identity()

    @app.post(TARGETS_PATH)
    async def targets(
        request: Request, ahead: bool = False, wait_s: WaitSeconds = None
    ) -> Response:
        return await api.targets(request, ahead, wait_s)

    @app.post(RESPONSES_PATH)
    async def responses(
        request: Request, body: ResponsesRequest, wait_s: WaitSeconds = None
    ) -> Response:
        return await api.responses(request, body, wait_s)

    @app.get(HEAD_PATH)
    async def head(request: Request, first: int, last: int) -> Response:
        return await api.head(request, first, last)

    return Gate(app, options, Metrics())
