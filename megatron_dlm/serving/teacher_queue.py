"""What passes between the thread that answers HTTP and the one that runs a teacher."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from megatron_dlm.teacher.wire import TeacherText
from megatron_dlm.types.teacher_targets import TeacherTargets

KEPT_BYTES = 1 << 30
"""Of targets that were computed and may be asked for, the latest."""

TOKENS_AT_ONCE = 65536
"""A batch for the teacher has about so many tokens, or one text."""

AHEAD_TOKENS = 1 << 22
"""Texts sent ahead that wait have no more tokens together; later ones are computed when asked."""


@dataclass
class _Work:
    """A text that waits for the teacher."""

    text: TeacherText
    waiting: list[Future[TeacherTargets]] = field(default_factory=list)


_Key = tuple[bytes, int]
"""Digest of a text, and k."""


class TeacherQueue:
    """Texts wait here in order, those that somebody waits for first; each is computed once.

    The thread of HTTP adds, the one of the teacher takes and answers.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked: OrderedDict[_Key, _Work] = OrderedDict()
        self._ahead: OrderedDict[_Key, _Work] = OrderedDict()
        self._ahead_tokens = 0
        self._computed: OrderedDict[_Key, _Work] = OrderedDict()
        """Of the batch that the teacher works on."""
        self._kept: OrderedDict[_Key, TeacherTargets] = OrderedDict()
        self._kept_bytes = 0
        self._error: Exception | None = None
        self._head: Future[Tensor] | None = None
        self.stopping = False

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for a text."""
        with self._changed:
            return not self._asked and not any(w.waiting for w in self._computed.values())

    @property
    def waiting_texts(self) -> int:
        """Texts that somebody waits for and that are not begun."""
        return len(self._asked)

    def ask(self, texts: Sequence[TeacherText], k: int) -> list[Future[TeacherTargets]]:
        """The targets of texts, some time later."""
        futures = []
        with self._changed:
            for text in texts:
                key = text.digest, k
                future: Future[TeacherTargets] = Future()
                futures.append(future)
                if self._error is not None:
                    future.set_exception(self._error)
                elif key in self._kept:
                    self._kept.move_to_end(key)
                    future.set_result(self._kept[key])
                elif key in self._computed:
                    self._computed[key].waiting.append(future)
                else:
                    work = self._asked.get(key) or self._taken_ahead(key) or _Work(text)
                    work.waiting.append(future)
                    self._asked[key] = work
            self._changed.notify()
        return futures

    def ask_head(self) -> Future[Tensor]:
        """The teacher's output layer [V, h], some time later."""
        with self._changed:
            if self._head is None:
                self._head = Future()
            if self._error is not None and not self._head.done():
                self._head.set_exception(self._error)
            self._changed.notify()
            return self._head

    @property
    def wants_head(self) -> bool:
        """Whether it was asked for and is not there."""
        return self._head is not None and not self._head.done()

    def give_head(self, head: Tensor) -> None:
        """Answer all who asked for it, or will."""
        assert self._head is not None
        self._head.set_result(head)

    def send_ahead(self, texts: Sequence[TeacherText], k: int) -> None:
        """Compute texts when nobody waits for others."""
        with self._changed:
            for text in texts:
                key, tokens = (text.digest, k), len(text.token_ids)
                known = (self._kept, self._computed, self._asked, self._ahead)
                if any(key in place for place in known):
                    continue
                if self._ahead_tokens + tokens <= AHEAD_TOKENS:
                    self._ahead[key] = _Work(text)
                    self._ahead_tokens += tokens
            self._changed.notify()

    def take(self, timeout_s: float) -> tuple[list[TeacherText], int]:
        """The next batch, of one k, and that; empty if none comes in time, or sooner."""
        with self._changed:
            if not self._asked and not self._ahead and not self.wants_head:
                self._changed.wait(timeout_s)
            k, tokens = -1, 0
            for place in (self._asked, self._ahead):
                for key, work in list(place.items()):
                    length = len(work.text.token_ids)
                    full = tokens and tokens + length > TOKENS_AT_ONCE
                    if full or k not in (-1, key[1]):
                        continue
                    k, tokens = key[1], tokens + length
                    self._computed[key] = work
                    del place[key]
                    self._ahead_tokens -= length if place is self._ahead else 0
                if self._computed:
                    break  # what nobody waits for does not hold up what somebody will ask next
            return [work.text for work in self._computed.values()], k

    def answer(self, targets: Sequence[TeacherTargets]) -> None:
        """Give the targets of the batch that was taken."""
        with self._changed:
            done, self._computed = self._computed, OrderedDict()
            for (key, _), found in zip(done.items(), targets, strict=True):
                self._kept[key] = found
                self._kept_bytes += _size(found)
            while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
                self._kept_bytes -= _size(self._kept.popitem(last=False)[1])
        for work, found in zip(done.values(), targets, strict=True):
            for future in work.waiting:
                _settle(future, found)

    def fail(self, error: Exception) -> None:
        """Give everybody who waits an error, and all who ask later."""
        with self._changed:
            self._error = error
            if self.wants_head:
                assert self._head is not None
                self._head.set_exception(error)
            left = [*self._asked.values(), *self._computed.values()]
            self._ahead.clear()
            self._asked.clear()
            self._computed.clear()
        for work in left:
            for future in work.waiting:
                _settle(future, error)

    def _taken_ahead(self, key: _Key) -> _Work | None:
        work = self._ahead.pop(key, None)
        if work is not None:
            self._ahead_tokens -= len(work.text.token_ids)
        return work


def _size(targets: TeacherTargets) -> int:
    tensors = [tensor for tensor in vars(targets).values() if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _settle(future: Future[TeacherTargets], result: TeacherTargets | Exception) -> None:
    if not future.set_running_or_notify_cancel():
        return  # the client has gone
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
