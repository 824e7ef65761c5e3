"""What passes between the thread that answers HTTP and the one that runs a teacher."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megatron_dlm.teacher.wire import Drawing, TeacherPrompt, TeacherRow
from megatron_dlm.types.teacher_targets import TeacherTargets

KEPT_BYTES = 1 << 30
"""Of results that were computed and may be asked for. Where as much was not asked for yet, nothing
more is computed ahead; what was asked for makes room first."""

KEPT_SECONDS = 3600.0
"""After which a result is dropped that was given, or that nobody has asked for yet, as its text was
sent ahead."""

ABANDONED_SECONDS = 120.0
"""After which a request, or its result, that no client asks for again is dropped: one that waits
asks again at once, or after half a minute at most."""

TOKENS_AT_ONCE = 65536
"""A batch of texts for the teacher has about so many tokens, or one row."""

AHEAD_TOKENS = 1 << 22
"""Texts sent ahead that wait have no more tokens together; later ones are computed when asked."""

TEXTS_IN_A_ROW = 8
"""Batches of texts, after which prompts of another run have waited long enough."""

Item = TeacherRow | TeacherPrompt
"""What waits for the teacher."""

Wanted = int | Drawing
"""What is wanted of it: the k most likely tokens, 0 for hidden states, or a response."""

Result = TeacherTargets | list[int]


@dataclass
class _Work:
    """Something that waits for the teacher, and when somebody last asked for it."""

    item: Item
    waiting: list[Future[Any]] = field(default_factory=list)
    asked: float | None = None

    def is_abandoned(self, now: float) -> bool:
        """Whether all who asked have gone."""
        if self.asked is None or now - self.asked <= ABANDONED_SECONDS:
            return False
        return all(future.cancelled() for future in self.waiting)


@dataclass
class _Kept:
    """A result, whether somebody has asked for it, and whether somebody got it."""

    result: Result
    num_bytes: int
    was_asked: bool
    was_given: bool
    since: float

    @property
    def seconds(self) -> float:
        """How long it is kept."""
        return ABANDONED_SECONDS if self.was_asked and not self.was_given else KEPT_SECONDS


_Key = tuple[bytes, Wanted]
"""Digest, and what is wanted."""


class TeacherQueue:
    """Texts and prompts wait here in order; each is computed once.

    Texts that somebody waits for come first, then prompts, then texts that somebody will ask for.
    After `TEXTS_IN_A_ROW` batches of texts it is the turn of prompts that wait meanwhile.
    The thread of HTTP adds, the one of the teacher takes and answers.

    Args:
        prompts_at_once: Most prompts of a batch: texts wait until all of it are answered.
    """

    def __init__(self, prompts_at_once: int = 256) -> None:
        self._prompts_at_once = prompts_at_once
        self._changed = threading.Condition()
        self._asked: OrderedDict[_Key, _Work] = OrderedDict()
        self._prompts: OrderedDict[_Key, _Work] = OrderedDict()
        self._ahead: OrderedDict[_Key, _Work] = OrderedDict()
        self._ahead_tokens = 0
        self._texts_in_a_row = 0
        self._computed: OrderedDict[_Key, _Work] = OrderedDict()
        """Of the batch that the teacher works on."""
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()
        self._error: Exception | None = None
        self._head: Future[Tensor] | None = None
        self.stopping = False

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for anything."""
        with self._changed:
            waits = any(work.waiting for work in self._computed.values())
            return not (self._asked or self._prompts or waits)

    @property
    def waiting(self) -> int:
        """What somebody waits for and is not begun."""
        return len(self._asked) + len(self._prompts)

    def knows(self, items: Sequence[Item], wanted: Wanted) -> bool:
        """Whether all of this was asked for before, and is not forgotten."""
        places = (self._kept, self._computed, self._asked, self._prompts)
        with self._changed:
            return all(any((i.digest, wanted) in p for p in places) for i in items)

    def ask(self, items: Sequence[Item], wanted: Wanted) -> list[Future[Any]]:
        """The targets of rows, or responses to prompts, some time later."""
        futures = []
        place = self._prompts if isinstance(wanted, Drawing) else self._asked
        with self._changed:
            for item in items:
                key = item.digest, wanted
                future: Future[Any] = Future()
                futures.append(future)
                if self._error is not None:
                    future.set_exception(self._error)
                elif key in self._kept:
                    kept = self._kept[key]
                    kept.was_asked = kept.was_given = True
                    kept.since = time.monotonic()
                    self._kept.move_to_end(key)
                    future.set_result(kept.result)
                else:
                    work = self._computed.get(key) or place.get(key)
                    if work is None:
                        work = place[key] = self._taken_ahead(key) or _Work(item)
                    work.waiting.append(future)
                    work.asked = time.monotonic()
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

    def send_ahead(self, rows: Sequence[TeacherRow], k: int) -> None:
        """Compute rows when nobody waits for anything else, and while there is room for them."""
        with self._changed:
            for row in rows:
                key, tokens = (row.digest, k), row.num_tokens
                known = (self._kept, self._computed, self._asked, self._ahead)
                if any(key in place for place in known):
                    continue
                if self._ahead_tokens + tokens <= AHEAD_TOKENS:
                    self._ahead[key] = _Work(row)
                    self._ahead_tokens += tokens
            self._changed.notify()

    def take(self, timeout_s: float) -> tuple[list[Any], Wanted]:
        """The next batch, of which all is asked for alike; empty if none comes in time."""
        with self._changed:
            self._forget()
            if not any(self._places) and not self.wants_head:
                self._changed.wait(timeout_s)
            wanted: Wanted | None = None
            used, now = 0, time.monotonic()
            for place in self._places:
                for key, work in list(place.items()):
                    if work.is_abandoned(now):
                        del place[key]
                        continue
                    is_prompt = isinstance(key[1], Drawing)
                    cost = 1 if is_prompt else work.item.num_tokens
                    most = self._prompts_at_once if is_prompt else TOKENS_AT_ONCE
                    if (used and used + cost > most) or wanted not in (None, key[1]):
                        continue
                    wanted, used = key[1], used + cost
                    self._computed[key] = work
                    del place[key]
                    self._ahead_tokens -= cost if place is self._ahead else 0
                if self._computed:
                    is_turn = place is self._prompts or not self._prompts
                    self._texts_in_a_row = 0 if is_turn else self._texts_in_a_row + 1
                    break  # what nobody waits for does not hold up what somebody will ask next
            items = [work.item for work in self._computed.values()]
            return items, 0 if wanted is None else wanted

    @property
    def _places(self) -> list[OrderedDict[_Key, _Work]]:
        """Where there may be something to do, what is most urgent first."""
        not_given = sum(kept.num_bytes for kept in self._kept.values() if not kept.was_given)
        ahead = [self._ahead] if not_given < KEPT_BYTES else []
        if self._texts_in_a_row >= TEXTS_IN_A_ROW:
            return [self._prompts, self._asked, *ahead]
        return [self._asked, self._prompts, *ahead]

    def answer(self, results: Sequence[Result | Exception]) -> None:
        """Give the results of the batch that was taken, or why there is none."""
        now = time.monotonic()
        with self._changed:
            done, self._computed = self._computed, OrderedDict()
            for (key, work), result in zip(done.items(), results, strict=True):
                given = [_settle(future, result) for future in work.waiting]
                if not isinstance(result, Exception):
                    was_asked = work.asked is not None
                    self._kept[key] = _Kept(result, _size(result), was_asked, any(given), now)
            self._forget()

    def fail(self, error: Exception) -> None:
        """Give everybody who waits an error, and all who ask later."""
        with self._changed:
            self._error = error
            if self.wants_head:
                assert self._head is not None
                self._head.set_exception(error)
            places = (self._asked, self._prompts, self._computed)
            left = [work for place in places for work in place.values()]
            for place in (*places, self._ahead):
                place.clear()
        for work in left:
            for future in work.waiting:
                _settle(future, error)

    def _forget(self) -> None:
        """Make room: of what is old, and of what was given, the earliest first."""
        used, latest = sum(k.num_bytes for k in self._kept.values()), time.monotonic()
        for key, kept in list(self._kept.items()):
            is_old = latest - kept.since > kept.seconds
            if is_old or (kept.was_given and used > KEPT_BYTES):
                used -= kept.num_bytes
                del self._kept[key]

    def _taken_ahead(self, key: _Key) -> _Work | None:
        work = self._ahead.pop(key, None)
        if work is not None:
            self._ahead_tokens -= work.item.num_tokens
        return work


def _size(result: Result) -> int:
    if isinstance(result, list):
        return 8 * len(result)
    tensors = [tensor for tensor in vars(result).values() if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _settle(future: Future[Any], result: Result | Exception) -> bool:
    """Give somebody a result; whether anybody gets it."""
    if not future.set_running_or_notify_cancel():
        return False  # the client has gone
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
    return True
