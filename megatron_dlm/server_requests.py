"""Requests to servers: tries with growing pauses, an end to all of them, and what failed.

Every process that asks a server does it this way, be it a server of rollouts or of a teacher.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx2

from megatron_dlm.api_key import authorization
from megatron_dlm.errors import UserError

T = TypeVar("T")

CONNECT_SECONDS = 10.0
"""Until a server that does not take a connection has failed."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0
"""Before a request is sent again; each pause is twice the one before."""


def open_client(key: str | None, connections: int | None = None) -> httpx2.AsyncClient:
    """A client for so many requests at once; None: for any number.

    Limits of time are those of `Tries`. Servers of a job are not behind the proxy that the way out
    may need, so the environment is not read.
    """
    return httpx2.AsyncClient(
        headers=authorization(key),
        timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
        limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
        trust_env=False,
    )


class Tries:
    """How often one request is sent, and how long that may take.

    Args:
        refuse: Makes the error of a request that is given up, of how that came.
        retries: Tries after the first one; None: as many as there is time for.
        seconds_each: That a try may take; None: what is left of all.
        seconds: That all of them may take, pauses included; None: any time.
        places: Servers that are asked in turn: pauses are only between rounds.
    """

    def __init__(
        self,
        refuse: Callable[[str], UserError],
        *,
        retries: int | None = None,
        seconds_each: float | None = None,
        seconds: float | None = None,
        places: int = 1,
    ) -> None:
        self._refuse, self._retries, self._places = refuse, retries, places
        self._seconds_each, self._seconds = seconds_each, seconds
        self._pause = FIRST_PAUSE_SECONDS
        self._began = time.monotonic()
        self.count = 0

    def start_again(self) -> None:
        """The server is at work: the time begins anew."""
        self._began = time.monotonic()
        self._pause = FIRST_PAUSE_SECONDS

    @property
    def is_over(self) -> bool:
        """Whether there is no time left."""
        return self._left == 0

    @property
    def _left(self) -> float | None:
        if self._seconds is None:
            return None
        return max(self._seconds - (time.monotonic() - self._began), 0.0)

    async def answer(self, send: Callable[[int], Awaitable[httpx2.Response]]) -> httpx2.Response:
        """The first answer that sending again would not change: a good one, or a refusal.

        Args:
            send: Sends the request to the server of this number, the whole answer included.

        Raises:
            UserError: There is none.
        """
        before = ""
        while True:
            place = self.count % self._places
            self.count += 1
            limits = [limit for limit in (self._left, self._seconds_each) if limit is not None]
            limit = min(limits, default=None)
            failure: Any
            try:
                async with asyncio.timeout(limit):
                    answer = await send(place)
            except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
                raise self._refuse(described(error)) from error
            except httpx2.TransportError as error:
                failure = error
            except TimeoutError:
                failure = f"nothing in {limit:g} s{before}"
            else:
                if not _may_work_later(answer.status_code):
                    return answer
                failure = answer
            await self.pause_after(failure)
            if not isinstance(failure, str):
                before = f", and before {described(failure)}"

    async def pause_after(self, failure: Any) -> None:
        """Wait until the next try is due.

        Raises:
            UserError: There is none left, or no time for it after the pause.
        """
        left = self._left
        is_last = self._retries is not None and self.count > self._retries
        pause = self._pause if self.count % self._places == 0 else 0.0
        if is_last or (left is not None and pause >= left):
            tries = "1 try" if self.count == 1 else f"{self.count} tries"
            time_is_up = "" if is_last else f"{self._seconds:g} s and "
            raise self._refuse(f"no answer in {time_is_up}{tries}: {described(failure)}")
        if self.count % self._places == 0:
            await asyncio.sleep(pause)
            self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)


def described(failure: Any) -> str:
    """Why a try failed: an answer's status and message, an exception's, or the text itself."""
    if isinstance(failure, str):
        return failure
    if isinstance(failure, Exception):
        return f"{type(failure).__name__}: {failure}"
    return f"status {failure.status_code}: {_message(failure)}"


def _may_work_later(status: int) -> bool:
    return status >= 500 or status in (408, 429)


def _message(answer: httpx2.Response) -> str:
    """What a server says of an error."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:300] or answer.reason_phrase


class RequestThread:
    """A thread for requests, which no end of the process waits for."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin with something; cancelling what is returned ends it."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._loop.run_forever, name="requests", daemon=True
            )
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self, client: httpx2.AsyncClient) -> None:
        """Give up what has not ended, and close the client that it was sent by."""
        if self._thread is not None:
            asyncio.run_coroutine_threadsafe(self._end(client), self._loop)
            self._thread.join()
            self._thread = None
        self._loop.close()

    async def _end(self, client: httpx2.AsyncClient) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await client.aclose()
        self._loop.stop()
