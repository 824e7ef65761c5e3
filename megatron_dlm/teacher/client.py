"""Asks servers of a teacher for targets of texts and responses to prompts, several at a time."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import cached_property
from typing import Any, Generic, TypeVar

import httpx2
from torch import Tensor

from megatron_dlm.activity import ACTIVITY
from megatron_dlm.api_key import API_KEY_VARIABLE, key_of_environment
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.server_requests import RequestThread, Tries, described, open_client
from megatron_dlm.teacher.wire import (
    FINGERPRINT_HEADER,
    HEAD_PATH,
    IDENTITY_PATH,
    RESPONSES_PATH,
    TARGETS_PATH,
    Drawing,
    TeacherIdentity,
    TeacherPrompt,
    TeacherRow,
    pack_texts,
    prompts_to_json,
    responses_from_json,
    unpack_head,
    unpack_targets,
)
from megatron_dlm.types.teacher_targets import TeacherTargets

T = TypeVar("T")

TOKENS_PER_REQUEST = 32768
"""A request has texts of about so many tokens, or one row."""

WAIT_SECONDS = 20.0
"""After so long a server at work says how far it is, in place of an answer."""

POLL_SECONDS = 0.2
"""How often ranks that wait for answers look whether the run is to stop."""


class TeacherClient:
    """A teacher behind one or several servers, which answer the same.

    Args:
        urls: Of the servers.
        field: The option that names them, for errors.
        max_requests: To each server at a time.
        timeout_s: That a request may take with all its tries, or a server that works on it until
            it has come further.
        key: That the servers ask for (default: of `API_KEY_VARIABLE`).
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        field: str,
        max_requests: int,
        timeout_s: float,
        key: str | None = None,
    ) -> None:
        self._urls = [url.rstrip("/") for url in urls]
        self._field, self._timeout_s = field, timeout_s
        self._http = open_client(key_of_environment() if key is None else key)
        self._thread = RequestThread()
        self._max_requests = max_requests
        self._room = asyncio.Semaphore(max_requests * len(self._urls))
        # What is sent ahead must not take the place of what is waited for.
        self._room_ahead = asyncio.Semaphore(len(self._urls))
        self._closed = False
        self._wait_s = min(timeout_s / 2, WAIT_SECONDS)

    @cached_property
    def identity(self) -> TeacherIdentity:
        """Who the teacher is; asked at first.

        Raises:
            UserError: A server does not answer, or they have different teachers.
        """
        asked = self.ask_identity()
        asked.wait_to_the_end()
        return self._same(asked)

    def learn_identity(self, asked: "Asked[TeacherIdentity]") -> TeacherIdentity:
        """What all servers have answered to `ask_identity`, kept as `identity`.

        Raises:
            UserError: One has not answered, or they have different teachers.
        """
        identity = vars(self)["identity"] = self._same(asked)
        return identity

    def ask_identity(self) -> "Asked[TeacherIdentity]":
        """Ask all servers who the teacher is, without waiting."""
        return Asked(
            {
                self._thread.submit(self._identity_of(url)): [number]
                for number, url in enumerate(self._urls)
            }
        )

    def _same(self, asked: "Asked[TeacherIdentity]") -> TeacherIdentity:
        """What all servers have answered."""
        found = asked.result()
        for url, other in zip(self._urls, found, strict=True):
            if other.computes != found[0].computes:
                raise bad_value(
                    self._field,
                    url,
                    f"has the teacher {other.name} ({other.precision}), and {self._urls[0]} has "
                    f"{found[0].name} ({found[0].precision}), other weights",
                    "name servers of one model",
                )
        return found[0]

    async def _identity_of(self, url: str) -> list[TeacherIdentity]:
        answer = await self._answered([url], lambda u: self._http.get(u + IDENTITY_PATH))
        try:
            return [TeacherIdentity.from_json(answer.json())]
        except ValueError as error:
            raise self._no_teacher(url, str(error)) from error

    def begin(self, rows: Sequence[TeacherRow], k: int) -> "Asked[TeacherTargets]":
        """Ask for the targets of rows of texts, without waiting.

        Args:
            rows: At least one prediction each.
            k: Tokens of a distribution; 0: hidden states.
        """
        _ = self.identity

        def ask(server: int, part: Sequence[TeacherRow]) -> Coroutine[Any, Any, Any]:
            return self._ask(server, part, k)

        costs = [row.num_tokens for row in rows]
        return self._begin(rows, costs, TOKENS_PER_REQUEST, ask)

    def begin_responses(
        self, prompts: Sequence[TeacherPrompt], drawing: Drawing, at_once: int
    ) -> "Asked[list[int]]":
        """Ask for responses to prompts, token ids each, without waiting.

        Args:
            prompts: To answer.
            drawing: How.
            at_once: Prompts that each server has at a time, about.
        """
        _ = self.identity

        def ask(server: int, part: Sequence[TeacherPrompt]) -> Coroutine[Any, Any, Any]:
            return self._ask_responses(server, part, drawing)

        of_request = -(-at_once // self._max_requests)
        return self._begin(prompts, [1] * len(prompts), of_request, ask)

    def _begin(
        self,
        work: Sequence[Any],
        costs: Sequence[int],
        most: int,
        ask: Callable[[int, Sequence[Any]], Coroutine[Any, Any, list[T]]],
    ) -> "Asked[T]":
        of_server: dict[int, list[int]] = {}
        for index, one in enumerate(work):
            of_server.setdefault(self._server_of(one), []).append(index)
        parts = [
            (server, part)
            for server, indices in of_server.items()
            for part in _parts(indices, costs, most)
        ]
        parts.sort(key=lambda server_and_part: server_and_part[1][0])  # in the order of the work
        return Asked(
            {
                self._thread.submit(ask(server, [work[index] for index in part])): part
                for server, part in parts
            }
        )

    def targets(self, rows: Sequence[TeacherRow], k: int) -> list[TeacherTargets]:
        """The targets of rows, in their order; see `begin`.

        Raises:
            UserError: A server refused a request, or none answered it in time.
        """
        return self.begin(rows, k).all_results()

    def head(self, first: int, last: int, hidden_size: int) -> Tensor:
        """Rows of the teacher's output layer; see `begin_head`.

        Raises:
            UserError: No server gave them in time.
        """
        (head,) = self.begin_head(first, last, hidden_size).all_results()
        return head

    def begin_head(self, first: int, last: int, hidden_size: int) -> "Asked[Tensor]":
        """Ask for rows of the teacher's output layer, which hidden states go with.

        The one result is [last - first, h].
        """
        _ = self.identity
        return Asked({self._thread.submit(self._ask_head(first, last, hidden_size)): [0]})

    async def _ask_head(self, first: int, last: int, hidden_size: int) -> list[Tensor]:
        rows = {"first": str(first), "last": str(last)}
        expected = {FINGERPRINT_HEADER: self.identity.computes}

        def send(url: str) -> Awaitable[httpx2.Response]:
            return self._http.get(url + HEAD_PATH, params=rows, headers=expected)

        answer = await self._answered(self._urls, send)
        try:
            return [unpack_head(answer.content, last - first, hidden_size)]
        except ValueError as error:
            raise self._no_teacher(self._urls[0], str(error)) from error

    def send_ahead(self, row: TeacherRow, k: int) -> None:
        """Let a server begin with texts that will be asked for; nothing is waited for.

        Where this fails, the server begins when it is asked.
        """
        if self._closed:
            return
        _ = self.identity
        url = self._urls[self._server_of(row)]

        async def send() -> None:
            with suppress(httpx2.HTTPError, TimeoutError):
                async with self._room_ahead, asyncio.timeout(self._timeout_s):
                    await self._post(url, [row], k, {"ahead": "1"})

        self._thread.submit(send())

    def close(self) -> None:
        """Send nothing more; what is asked for is not waited for."""
        if not self._closed:
            self._closed = True
            self._thread.close(self._http)

    def _server_of(self, work: TeacherRow | TeacherPrompt) -> int:
        """The same on all ranks, so that each text is computed once."""
        return int.from_bytes(work.digest[:8], "little") % len(self._urls)

    def _from(self, server: int) -> list[str]:
        """All servers, this one first: another one answers where it fails."""
        return self._urls[server:] + self._urls[:server]

    def _post(
        self, url: str, rows: Sequence[TeacherRow], k: int, query: dict[str, str]
    ) -> Awaitable[httpx2.Response]:
        return self._http.post(
            url + TARGETS_PATH,
            params={"wait_s": str(self._wait_s), **query},
            content=pack_texts(rows, k),
            headers={FINGERPRINT_HEADER: self.identity.computes},
        )

    async def _ask(self, server: int, rows: Sequence[TeacherRow], k: int) -> list[TeacherTargets]:
        urls = self._from(server)
        async with self._room:
            answer = await self._answered(urls, lambda url: self._post(url, rows, k, {}))
        try:
            return unpack_targets(answer.content, [len(row) for row in rows], k)
        except ValueError as error:
            raise self._no_teacher(urls[0], str(error)) from error

    async def _ask_responses(
        self, server: int, prompts: Sequence[TeacherPrompt], drawing: Drawing
    ) -> list[list[int]]:
        urls, headers = self._from(server), {FINGERPRINT_HEADER: self.identity.computes}

        def send(url: str) -> Awaitable[httpx2.Response]:
            query = {"wait_s": str(self._wait_s)}
            return self._http.post(url + RESPONSES_PATH, params=query, json=body, headers=headers)

        async with self._room:
            body = prompts_to_json(prompts, drawing)  # large: none of what still waits for room
            answer = await self._answered(urls, send)
        try:
            return responses_from_json(answer.json(), prompts, drawing)
        except ValueError as error:
            raise self._no_teacher(urls[0], str(error)) from error

    async def _answered(
        self, urls: Sequence[str], send: Callable[[str], Awaitable[httpx2.Response]]
    ) -> httpx2.Response:
        """The first good answer of the servers, asked in turn until the time is up.

        A server that is still at work says how far it is, and is asked again.
        """
        url, progress = urls[0], -1

        def refuse(problem: str) -> UserError:
            remedy = "see that the teacher runs there and can be reached, or raise"
            return bad_value(self._field, url, problem, f"{remedy} --teacher-timeout-s")

        async def sent(place: int) -> httpx2.Response:
            nonlocal url
            url = urls[place]
            return await send(url)

        tries = Tries(refuse, seconds=self._timeout_s, places=len(urls))
        while True:
            answer = await tries.answer(sent)
            if answer.status_code == 202:
                tries.count -= 1  # the same server
                if (found := _progress(answer)) != progress:
                    progress = found
                    tries.start_again()
                elif tries.is_over:
                    raise refuse(f"has come no further in {self._timeout_s:g} s")
            elif answer.is_success:
                return answer
            else:
                raise self._refused(url, answer)

    def _refused(self, url: str, answer: httpx2.Response) -> UserError:
        status, problem = answer.status_code, described(answer)
        if status in (404, 405):
            return self._no_teacher(url, problem)
        remedies = {
            400: "change what the server names, or start it with other limits",
            401: f"set {API_KEY_VARIABLE} to the key that the server was started with",
            409: "start the server with the teacher that it had before",
        }
        remedy = remedies.get(status, "see the server's log")
        return bad_value(self._field, url, problem, remedy)

    def _no_teacher(self, url: str, problem: str) -> UserError:
        return bad_value(
            self._field, url, problem, "name servers that megatron-dlm serve-teacher started"
        )


class Asked(Generic[T]):
    """Requests on their way.

    Args:
        parts: What each request asks for, by its numbers.
    """

    def __init__(self, parts: dict[Future[list[T]], list[int]]) -> None:
        self._parts = parts

    def wait(self, seconds: float) -> None:
        """Wait until all are answered or one never will be, but not for longer."""
        wait(self._parts, seconds, "FIRST_EXCEPTION")

    def wait_to_the_end(self) -> None:
        """Wait until all are answered or one never will be; signals are handled meanwhile."""
        while not self.has_ended:
            self.wait(POLL_SECONDS)
            ACTIVITY.step()  # a server that hangs has a timeout of its own

    def all_results(self) -> list[T]:
        """Wait for all; see `result`."""
        self.wait_to_the_end()
        return self.result()

    @property
    def error(self) -> BaseException | None:
        """Why one is never answered."""
        ended = (future for future in self._parts if future.done() and not future.cancelled())
        return next((error for future in ended if (error := future.exception())), None)

    @property
    def has_ended(self) -> bool:
        """Whether all are answered, or one never will be."""
        return self.error is not None or all(future.done() for future in self._parts)

    def cancel(self) -> None:
        """Give up what is not answered yet."""
        for future in self._parts:
            future.cancel()

    def taken(self) -> dict[int, T]:
        """What has come since this was called last, by its numbers; nothing here keeps it."""
        come = [f for f in self._parts if f.done() and not f.cancelled() and not f.exception()]
        return {
            index: found
            for future in come
            for index, found in zip(self._parts.pop(future), future.result(), strict=True)
        }

    def result(self) -> list[T]:
        """All that was asked for, in its order; after the end, once.

        Raises:
            UserError: A server refused a request, or none answered it in time.
        """
        if self.error is not None:
            self.cancel()
            raise self.error
        found = self.taken()
        return [found[index] for index in range(len(found))]


def _progress(answer: httpx2.Response) -> int:
    """How far a server that is at work has come, as it counts it."""
    try:
        return int(answer.json()["progress"])
    except (ValueError, KeyError, TypeError):
        return -1


def _parts(indices: Sequence[int], costs: Sequence[int], most: int) -> list[list[int]]:
    """What goes into each request, of at most this cost or of one piece."""
    parts: list[list[int]] = []
    used = most
    for index in indices:
        if used + costs[index] > most:
            parts.append([])
            used = 0
        parts[-1].append(index)
        used += costs[index]
    return parts
