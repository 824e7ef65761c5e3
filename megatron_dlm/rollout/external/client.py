"""One server, over HTTP: requests with retries, and errors that name it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2

from megatron_dlm.api_key import authorization, key_of_environment
from megatron_dlm.errors import UserError, bad_value

FIELD = "--rollout-engine-urls"
CONNECT_SECONDS = 10.0
LONGEST_PAUSE = 30.0
"""Seconds between two tries at most; the first pause is of one second, each other twice as long."""

RETRIED = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses after which the same request may work."""


@dataclass(frozen=True)
class RolloutServer:
    """A server that decodes.

    Attributes:
        url: Its address, without a path.
        timeout_s: Seconds that a request may take.
        retries: Tries after the first one.
    """

    url: str
    timeout_s: float
    retries: int

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path.

        Raises:
            UserError: It cannot be had.
        """
        return self._request(lambda client: client.get(self.url + path), path)

    def post(self, path: str, body: Mapping[str, Any], *, retries: int | None = None) -> Any:
        """The JSON answer to a JSON object.

        Args:
            path: Where to.
            body: The object.
            retries: Instead of the server's, where a second try would not mean the same.

        Raises:
            UserError: The server does not take it.
        """
        return self._request(lambda client: client.post(self.url + path, json=body), path, retries)

    def _request(self, send: Callable[[Any], Any], path: str, retries: int | None = None) -> Any:
        tries = _Tries(self, path, self.retries if retries is None else retries)
        # Servers of a job are not behind the proxy that the way out may need.
        with httpx2.Client(timeout=self._timeout, headers=headers(), trust_env=False) as client:
            while True:
                try:
                    answer = send(client)
                except httpx2.TransportError as error:
                    time.sleep(tries.pause_after(error))
                    continue
                if answer.status_code not in RETRIED:
                    return tries.content(answer)
                time.sleep(tries.pause_after(answer))

    async def decode(self, client: Any, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of /generate to one prompt.

        A request that the server aborted is sent again.

        Args:
            client: An `httpx2.AsyncClient` of `open_client`.
            body: The request.

        Raises:
            UserError: There is none after all tries.
        """
        path = "/generate"
        tries = _Tries(self, path, self.retries)
        while True:
            try:
                answer = await client.post(self.url + path, json=body)
            except httpx2.TransportError as error:
                await asyncio.sleep(tries.pause_after(error))
                continue
            if answer.status_code in RETRIED:
                await asyncio.sleep(tries.pause_after(answer))
                continue
            content = tries.content(answer)
            reason = finish_reason(content)
            if reason != "abort":
                return dict(content)
            await asyncio.sleep(tries.pause_after("the server aborted it"))

    def open_client(self, connections: int) -> Any:
        """An `httpx2.AsyncClient` with room for so many requests at once."""
        return httpx2.AsyncClient(
            timeout=self._timeout,
            headers=headers(),
            trust_env=False,
            limits=httpx2.Limits(
                max_connections=connections, max_keepalive_connections=connections
            ),
        )

    @property
    def _timeout(self) -> Any:
        return httpx2.Timeout(self.timeout_s, connect=min(CONNECT_SECONDS, self.timeout_s))

    def refuse(self, problem: str, remedy: str) -> UserError:
        """The error for something about this server."""
        return bad_value(FIELD, self.url, problem, remedy)


def headers() -> dict[str, str]:
    """Of every request: the key in MEGATRON_DLM_API_KEY, if there is one."""
    return authorization(key_of_environment())


def finish_reason(answer: Any) -> str | None:
    """Why a response has ended: stop, length or abort; None if the answer has no such field."""
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    reason = meta.get("finish_reason") if isinstance(meta, dict) else None
    kind = reason.get("type") if isinstance(reason, dict) else None
    return kind if isinstance(kind, str) else None


class _Tries:
    """How often a request was tried."""

    def __init__(self, server: RolloutServer, path: str, retries: int) -> None:
        self._server = server
        self._path = path
        self._left = retries
        self._pause = 1.0

    def pause_after(self, failure: Any) -> float:
        """Seconds to wait before the next try.

        Raises:
            UserError: There is none left.
        """
        if self._left <= 0:
            problem = f"{self._path} is not answered ({_described(failure)})"
            remedy = "start the server, or look at its log; see --rollout-engine-timeout-s"
            raise self._server.refuse(problem, f"{remedy} and --rollout-engine-retries")
        self._left -= 1
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        return pause

    def content(self, answer: Any) -> Any:
        """What an answer says, as JSON knows it; nothing of an answer without content.

        Raises:
            UserError: It is an error, or no JSON.
        """
        if answer.status_code >= 400:
            problem = f"{self._path} is refused ({_described(answer)})"
            raise self._server.refuse(problem, "see the server's log")
        if not answer.content:
            return {}
        try:
            return answer.json()
        except ValueError:
            if "json" not in answer.headers.get("content-type", ""):
                return {"message": answer.text}
            problem = f"{self._path} answers something that is no JSON"
            raise self._server.refuse(problem, "name an SGLang or rollout server") from None


def _described(failure: Any) -> str:
    if isinstance(failure, str):
        return failure
    if isinstance(failure, Exception):
        return f"{type(failure).__name__}: {failure}"
    return f"status {failure.status_code}: {failure.text[:300]}"
