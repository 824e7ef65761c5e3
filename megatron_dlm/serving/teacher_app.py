"""The HTTP side of a teacher's server: who it is, and targets of texts in binary bodies."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp

from megatron_dlm.models.architecture import Architecture
from megatron_dlm.serving.api_error import ApiError
from megatron_dlm.serving.app import Gate, answer_errors
from megatron_dlm.serving.metrics import Metrics
from megatron_dlm.serving.options import TeacherServerConfig
from megatron_dlm.serving.teacher_queue import TeacherQueue
from megatron_dlm.teacher.wire import (
    FINGERPRINT_HEADER,
    HEAD_PATH,
    IDENTITY_PATH,
    TARGETS_PATH,
    TeacherIdentity,
    TeacherText,
    pack_head,
    pack_targets,
    unpack_texts,
)

MOST_VALUES = 1 << 26
"""Probabilities of an answer: the process that gives all of them holds them at once."""


class TeacherApi:
    """Answers requests with a queue; all methods run in the thread of HTTP.

    Args:
        identity: Of the teacher.
        architecture: Of the teacher.
        queue: Where texts wait for it.
        options: Limits.
    """

    def __init__(
        self,
        identity: TeacherIdentity,
        architecture: Architecture,
        queue: TeacherQueue,
        options: TeacherServerConfig,
    ) -> None:
        self._identity, self._queue, self._options = identity, queue, options
        self._vocab_size = architecture.vocab_size
        self._positions = architecture.max_position_embeddings

    def identity(self) -> dict[str, Any]:
        """Who the teacher is."""
        return self._identity.to_json()

    def health(self) -> Response:
        """200 while requests are taken, 503 while the server stops."""
        if self._queue.stopping:
            raise _stopping()
        return Response()

    async def targets(self, request: Request, ahead: bool) -> Response:
        """The most likely tokens of texts; of those sent ahead only that they are known."""
        if self._queue.stopping:
            raise _stopping()
        self._check_teacher(request)
        try:
            texts, k = await asyncio.to_thread(unpack_texts, await request.body())
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        self._check(texts, k)
        if ahead:
            self._queue.send_ahead(texts, k)
            return Response(status_code=202)
        if self._queue.waiting_texts > self._options.max_waiting_texts:
            raise ApiError(429, "too many texts wait", code="queue_full", retry_after=1)
        futures = [asyncio.wrap_future(future) for future in self._queue.ask(texts, k)]
        try:
            async with asyncio.timeout(self._options.request_timeout_s):
                targets = await asyncio.gather(*futures)
        except TimeoutError:
            raise ApiError(504, "the request took too long", code="timeout") from None
        body = await asyncio.to_thread(pack_targets, targets)
        return Response(body, media_type="application/octet-stream")

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

    def _check(self, texts: Sequence[TeacherText], k: int) -> None:
        """Refuse what would end the process of the teacher."""
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
    async def targets(request: Request, ahead: bool = False) -> Response:
        return await api.targets(request, ahead)

    @app.get(HEAD_PATH)
    async def head(request: Request, first: int, last: int) -> Response:
        return await api.head(request, first, last)

    return Gate(app, options, Metrics())
