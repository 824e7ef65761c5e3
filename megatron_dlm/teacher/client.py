"""Asks servers of a teacher for its targets of texts, several requests at a time."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import cached_property
from typing import Any

import httpx2
from torch import Tensor

from megatron_dlm.api_key import authorization, key_of_environment
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.teacher.wire import (
    FINGERPRINT_HEADER,
    HEAD_PATH,
    IDENTITY_PATH,
    TARGETS_PATH,
    TeacherIdentity,
    TeacherText,
    pack_texts,
    unpack_head,
    unpack_targets,
)
from megatron_dlm.types.teacher_targets import TeacherTargets

TOKENS_PER_REQUEST = 32768
"""A request has texts of about so many tokens, or one text."""

POLL_SECONDS = 0.2
"""How often ranks that wait for answers look whether the run is to stop."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.25, 10.0
"""Before a request is sent again; each pause is twice the one before."""


class TeacherClient:
    """A teacher behind one or several servers, which answer the same.

    Args:
        urls: Of the servers.
        field: The option that names them, for errors.
        max_requests: To each server at a time.
        timeout_s: Until a request that failed each time is given up.
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
        self._http = httpx2.Client(
            headers=authorization(key_of_environment() if key is None else key),
            timeout=httpx2.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
            limits=httpx2.Limits(max_connections=None),
            trust_env=False,
        )
        self._threads = _Threads(max_requests * len(self._urls))
        # What is sent ahead must not take the place of what is waited for.
        self._ahead = _Threads(len(self._urls))
        self._closed = threading.Event()

    @cached_property
    def identity(self) -> TeacherIdentity:
        """Who the teacher is; asked at first.

        Raises:
            UserError: A server does not answer, or they have different teachers.
        """
        found = [self._identity_of(url) for url in self._urls]
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

    def _identity_of(self, url: str) -> TeacherIdentity:
        answer = self._answered([url], lambda u: self._http.get(u + IDENTITY_PATH))
        try:
            return TeacherIdentity.from_json(answer.json())
        except ValueError as error:
            raise self._no_teacher(url, str(error)) from error

    def begin(self, texts: Sequence[TeacherText], k: int) -> "Asked":
        """Ask for the targets of texts, without waiting.

        Args:
            texts: At least one prediction each.
            k: Tokens of a distribution; 0: hidden states.
        """
        of_server: dict[int, list[int]] = {}
        for index, text in enumerate(texts):
            of_server.setdefault(self._server_of(text), []).append(index)
        asked: dict[Future[list[TeacherTargets]], list[int]] = {}
        for server, indices in of_server.items():
            for part in _parts(indices, [len(text.token_ids) for text in texts]):
                future = self._threads.submit(self._ask, server, [texts[i] for i in part], k)
                asked[future] = part
        return Asked(asked)

    def targets(self, texts: Sequence[TeacherText], k: int) -> list[TeacherTargets]:
        """The targets of texts, in their order; see `begin`.

        Raises:
            UserError: A server refused a request, or none answered it in time.
        """
        asked = self.begin(texts, k)
        while not asked.has_ended:
            asked.wait(POLL_SECONDS)
        return asked.result()

    def head(self, first: int, last: int, hidden_size: int) -> Tensor:
        """Rows of the teacher's output layer, [last - first, h], which hidden states go with.

        Raises:
            UserError: No server gave them in time.
        """
        rows = {"first": str(first), "last": str(last)}
        expected = {FINGERPRINT_HEADER: self.identity.computes}
        answer = self._answered(
            self._urls, lambda url: self._http.get(url + HEAD_PATH, params=rows, headers=expected)
        )
        try:
            return unpack_head(answer.content, last - first, hidden_size)
        except ValueError as error:
            raise self._no_teacher(self._urls[0], str(error)) from error

    def send_ahead(self, text: TeacherText, k: int) -> None:
        """Let a server begin with a text that will be asked for; nothing is waited for.

        Where this fails, the server begins when it is asked.
        """
        if self._closed.is_set():
            return
        url = self._urls[self._server_of(text)]

        def send() -> None:
            try:
                self._post(url, [text], k, {"ahead": "1"})
            except httpx2.HTTPError:
                return

        self._ahead.submit(send)

    def close(self) -> None:
        """Send nothing more; what is asked for is not waited for."""
        self._closed.set()
        for threads in (self._threads, self._ahead):
            threads.close()
        self._http.close()

    def _server_of(self, text: TeacherText) -> int:
        """The same on all ranks, so that each text is computed once."""
        return int.from_bytes(text.digest[:8], "little") % len(self._urls)

    def _post(
        self, url: str, texts: Sequence[TeacherText], k: int, query: dict[str, str]
    ) -> httpx2.Response:
        return self._http.post(
            url + TARGETS_PATH,
            params=query,
            content=pack_texts(texts, k),
            headers={FINGERPRINT_HEADER: self.identity.computes},
        )

    def _ask(self, server: int, texts: Sequence[TeacherText], k: int) -> list[TeacherTargets]:
        urls = self._urls[server:] + self._urls[:server]  # another one where this one fails
        answer = self._answered(urls, lambda url: self._post(url, texts, k, {}))
        try:
            return unpack_targets(answer.content, [len(text) for text in texts], k)
        except ValueError as error:
            raise self._no_teacher(urls[0], str(error)) from error

    def _answered(
        self, urls: Sequence[str], send: Callable[[str], httpx2.Response]
    ) -> httpx2.Response:
        """The first good answer of the servers, asked in turn until the time is up."""
        deadline = time.monotonic() + self._timeout_s
        pause, tries = FIRST_PAUSE_SECONDS, 0
        while True:
            url = urls[tries % len(urls)]
            tries += 1
            try:
                answer = send(url)
                if answer.is_success:
                    return answer
                problem = f"status {answer.status_code}: {_message(answer)}"
                if answer.status_code < 500 and answer.status_code != 429:
                    raise self._no_teacher(url, problem)
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                problem = f"{type(error).__name__}: {error}"
                if isinstance(error, httpx2.InvalidURL | httpx2.UnsupportedProtocol):
                    raise self._no_teacher(url, problem) from error
            left = deadline - time.monotonic()
            if left <= 0 or self._closed.wait(min(pause, left)):
                raise bad_value(
                    self._field,
                    url,
                    f"no answer in {self._timeout_s:g} s and {tries} tries ({problem})",
                    "see that the teacher runs there and can be reached, or raise "
                    "--teacher-timeout-s",
                )
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _no_teacher(self, url: str, problem: str) -> UserError:
        return bad_value(
            self._field, url, problem, "name servers that megatron-dlm serve-teacher started"
        )


class Asked:
    """Requests on their way.

    Args:
        parts: The texts of each request, by their numbers.
    """

    def __init__(self, parts: dict[Future[list[TeacherTargets]], list[int]]) -> None:
        self._parts = parts

    def wait(self, seconds: float) -> None:
        """Wait until all are answered or one never will be, but not for longer."""
        wait(self._parts, seconds, "FIRST_EXCEPTION")

    @property
    def error(self) -> BaseException | None:
        """Why one is never answered."""
        return next((f.exception() for f in self._parts if f.done() and f.exception()), None)

    @property
    def has_ended(self) -> bool:
        """Whether all are answered, or one never will be."""
        return self.error is not None or all(future.done() for future in self._parts)

    def cancel(self) -> None:
        """Give up what is not sent yet."""
        for future in self._parts:
            future.cancel()

    def result(self) -> list[TeacherTargets]:
        """The targets of all texts, in their order.

        Raises:
            UserError: A server refused a request, or none answered it in time.
        """
        if self.error is not None:
            self.cancel()
            raise self.error
        found = {
            index: targets
            for future, part in self._parts.items()
            for index, targets in zip(part, future.result(), strict=True)
        }
        return [found[index] for index in range(len(found))]


class _Threads:
    """Threads for requests, which no end of the process waits for, unlike those of an executor.

    Args:
        number: Of requests at a time.
    """

    def __init__(self, number: int) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]]
        self._work = queue.SimpleQueue()
        self._number = number
        self._threads: list[threading.Thread] = []
        self._is_closed = False

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Call a function in one of them, later."""
        future: Future[Any] = Future()
        self._work.put((future, function, arguments))
        if len(self._threads) < self._number:
            thread = threading.Thread(target=self._run, name="teacher", daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def close(self) -> None:
        """Begin nothing more."""
        self._is_closed = True

    def _run(self) -> None:
        while True:
            future, function, arguments = self._work.get()
            if self._is_closed or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # raised again where the result is waited for
                future.set_exception(error)


def _parts(indices: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Texts of one request each."""
    parts: list[list[int]] = []
    tokens = TOKENS_PER_REQUEST
    for index in indices:
        if tokens + lengths[index] > TOKENS_PER_REQUEST:
            parts.append([])
            tokens = 0
        parts[-1].append(index)
        tokens += lengths[index]
    return parts


def _message(answer: httpx2.Response) -> str:
    """What a server says of an error."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.reason_phrase
