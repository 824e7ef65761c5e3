"""Clients that do not read what they asked for."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_dlm.serving.app import Api, Gate, ServedModel
from megatron_dlm.serving.jobs import Finished, Job, Started, Text
from megatron_dlm.serving.metrics import Metrics
from megatron_dlm.serving.options import ServerConfig
from megatron_dlm.serving.requests import CompletionRequest
from tests.unit_tests.rollout.tiny_models import GENERATION

SCOPE: dict[str, Any] = {"type": "http", "method": "POST", "path": "/", "headers": []}


class Decoded:
    """In a scheduler's place: every job is decoded when it is submitted."""

    stopping = False

    def submit(self, job: Job) -> None:
        job.notify(Started(1))
        for index in range(job.n):
            job.notify(Text(index, "text"))
            job.notify(Finished(index, "stop", 1, 1))


class AnySize:
    """In a prompt reader's place: no prompt is too long."""

    def check_size(self, request: object) -> None:
        pass


async def silent() -> Message:
    """A client that neither sends nor goes."""
    await asyncio.Event().wait()
    raise AssertionError


def test_a_place_is_free_when_all_is_decoded_and_not_when_all_is_read() -> None:
    async def ask() -> None:
        options, metrics = ServerConfig(max_waiting_requests=0), Metrics()
        model = ServedModel("m", GENERATION, 0, AnySize())  # type: ignore[arg-type]
        api = Api(model, Decoded(), options, metrics)  # type: ignore[arg-type]
        places = GENERATION.max_running_requests
        body = CompletionRequest(model="m", prompt="x", stream=True)
        unread = []
        for _ in range(2 * places):  # without status 429
            unread.append(await api.answer(Request(SCOPE, silent), body, "text_completion"))
            await asyncio.sleep(0)
        # What was decoded can be read still.
        answer = unread[0]
        assert isinstance(answer, StreamingResponse)
        pieces = [piece async for piece in answer.body_iterator]
        assert b'"text":"text"' in bytes(pieces[0])
        assert pieces[-1] == b"data: [DONE]\n\n"

    asyncio.run(asyncio.wait_for(ask(), 60))


def test_a_send_ends_with_the_deadline_of_its_request() -> None:
    ended = []

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        finally:
            ended.append(True)

    sent = []

    async def unread(message: Message) -> None:
        sent.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    app: ASGIApp = Gate(endless, ServerConfig(request_timeout_s=0.05), Metrics())
    asyncio.run(asyncio.wait_for(app(SCOPE, silent, unread), 60))
    assert sent == ["http.response.start", "http.response.body"]
    assert ended == [True]
