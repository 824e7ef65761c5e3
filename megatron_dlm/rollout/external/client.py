"""One server of rollouts, over HTTP: requests with retries, and errors that name it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx2

from megatron_dlm.api_key import key_of_environment
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.server_requests import Tries, described, open_client

FIELD = "--rollout-engine-urls"


class RefusedRequest(UserError):
    """An answer of a server that is an error, in one line.

    Attributes:
        status: Of HTTP.
    """

    def __init__(self, error: UserError, status: int) -> None:
        self.status = status
        super().__init__(str(error))


@dataclass(frozen=True)
class RolloutServer:
    """A server that decodes.

    Attributes:
        url: Its address, without a path.
        timeout_s: Seconds that a try of a request may take.
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
        content = asyncio.run(self._request("GET", path))
        if not isinstance(content, dict):
            problem = f"{path} answers something that is no JSON object"
            raise self.refuse(problem, "name an SGLang or rollout server")
        return content

    def post(self, path: str, body: Mapping[str, Any], *, retries: int | None = None) -> Any:
        """The JSON answer to a JSON object.

        Args:
            path: Where to.
            body: The object.
            retries: Instead of the server's, where a second try would not mean the same.

        Raises:
            UserError: The server does not take it.
        """
        return asyncio.run(self._request("POST", path, body, retries))

    async def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        retries: int | None = None,
    ) -> Any:
        async with self.open_client(1) as client:
            tries = self._tries(path, retries)
            send = partial(client.request, method, self.url + path, json=body)
            return self._content(await tries.answer(lambda _: send()), path)

    async def decode(self, client: httpx2.AsyncClient, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of /generate to one prompt.

        A request that the server aborted is sent again.

        Args:
            client: Of `open_client`.
            body: The request.

        Raises:
            UserError: There is none after all tries.
        """
        path = "/generate"
        tries = self._tries(path)
        while True:
            answer = await tries.answer(lambda _: client.post(self.url + path, json=body))
            content = self._content(answer, path)
            if finish_reason(content) != "abort":
                return dict(content)
            await tries.pause_after("the server aborted it")

    def open_client(self, connections: int) -> httpx2.AsyncClient:
        """A client with room for so many requests at once."""
        return open_client(key_of_environment(), connections)

    def _tries(self, path: str, retries: int | None = None) -> Tries:
        def refuse(problem: str) -> UserError:
            remedy = "start the server, or look at its log; see --rollout-engine-timeout-s"
            problem = f"{path} is not answered ({problem})"
            return self.refuse(problem, f"{remedy} and --rollout-engine-retries")

        retries = self.retries if retries is None else retries
        return Tries(refuse, retries=retries, seconds_each=self.timeout_s)

    def _content(self, answer: httpx2.Response, path: str) -> Any:
        """What an answer says, as JSON knows it; nothing of an answer without content.

        Raises:
            UserError: It is an error (`RefusedRequest`), or no JSON.
        """
        if answer.status_code >= 400:
            problem = f"{path} is refused ({described(answer)})"
            raise RefusedRequest(self.refuse(problem, "see the server's log"), answer.status_code)
        if not answer.content:
            return {}
        try:
            return answer.json()
        except ValueError:
            if "json" not in answer.headers.get("content-type", ""):
                return {"message": answer.text}
            problem = f"{path} answers something that is no JSON"
            raise self.refuse(problem, "name an SGLang or rollout server") from None

    def refuse(self, problem: str, remedy: str) -> UserError:
        """The error for something about this server."""
        return bad_value(FIELD, self.url, problem, remedy)


def finish_reason(answer: Any) -> str | None:
    """Why a response has ended: stop, length or abort; None if the answer has no such field."""
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    reason = meta.get("finish_reason") if isinstance(meta, dict) else None
    kind = reason.get("type") if isinstance(reason, dict) else None
    return kind if isinstance(kind, str) else None
