"""Texts that wait for a teacher: order, copies, what is kept."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_dlm.serving import teacher_queue
from megatron_dlm.serving.teacher_queue import TeacherQueue
from megatron_dlm.teacher.wire import Drawing, TeacherPrompt, TeacherRow, TeacherText
from megatron_dlm.types.teacher_targets import TopKTargets


def text(token: int, length: int = 2) -> TeacherRow:
    return TeacherRow((TeacherText(torch.full((length,), token), length - 1),))


def prompt(token: int) -> TeacherPrompt:
    return TeacherPrompt(token, torch.full((2,), token), 4)


GREEDY = Drawing(0.0, 0, 1.0, 0, (510,), 508, 511, 512)


def targets(token: int) -> TopKTargets:
    return TopKTargets(torch.full((1, 1), token), torch.zeros(1, 1), torch.zeros(1))


def tokens(items: list[Any]) -> list[int]:
    texts = [item.texts[0] if isinstance(item, TeacherRow) else item for item in items]
    return [int(text.token_ids[0]) for text in texts]


def test_who_waits_comes_first_and_each_text_is_computed_once() -> None:
    queue = TeacherQueue()
    queue.send_ahead([text(1), text(2)], 4)
    (first,) = queue.ask([text(3)], 4)
    (second,) = queue.ask([text(2)], 4)  # sent ahead before
    (other_k,) = queue.ask([text(3)], 5)
    taken, k = queue.take(0)
    assert (tokens(taken), k) == ([3, 2], 4)
    (again,) = queue.ask([text(3)], 4)  # while it is computed
    queue.send_ahead([text(3)], 4)
    queue.answer([targets(30), targets(20)])
    assert [int(f.result().token_ids) for f in (first, again, second)] == [30, 30, 20]
    assert not other_k.done()
    assert not queue.is_idle
    taken, k = queue.take(0)
    assert (tokens(taken), k) == ([3], 5)
    queue.answer([targets(31)])
    assert int(other_k.result().token_ids) == 31
    assert queue.is_idle
    taken, k = queue.take(0)
    assert (tokens(taken), k) == ([1], 4)
    queue.answer([targets(10)])
    assert queue.take(0)[0] == []
    (kept,) = queue.ask([text(1)], 4)
    assert int(kept.result(0).token_ids) == 10


def test_batches_and_memory_have_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_queue, "TOKENS_AT_ONCE", 5)
    monkeypatch.setattr(teacher_queue, "AHEAD_TOKENS", 8)
    queue = TeacherQueue()
    queue.send_ahead([text(1), text(2), text(3, 9), text(4), text(5), text(6)], 4)
    batches = [tokens(queue.take(0)[0])]
    queue.answer([targets(1), targets(2)])
    batches.append(tokens(queue.take(0)[0]))
    queue.answer([targets(4), targets(5)])
    assert batches == [[1, 2], [4, 5]]
    assert queue.take(0)[0] == []
    futures = queue.ask([text(7, 4), text(8, 4)], 4)
    assert queue.waiting == 2
    (long,) = queue.ask([text(7, 9)], 4)
    assert tokens(queue.take(0)[0]) == [7]
    queue.fail(RuntimeError("broken"))
    for future in (*futures, long, *queue.ask([text(8)], 4)):
        with pytest.raises(RuntimeError, match="broken"):
            future.result(0)


def test_what_nobody_has_got_is_computed_once_however_little_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Work ahead stops while memory is full of what will be asked for, and goes on afterwards."""
    monkeypatch.setattr(teacher_queue, "TOKENS_AT_ONCE", 4)
    monkeypatch.setattr(teacher_queue, "KEPT_BYTES", 40)  # of two targets of 8 + 4 + 4 bytes
    queue = TeacherQueue()
    everything = [text(token) for token in range(9)]
    queue.send_ahead(everything, 4)
    computed: list[int] = []

    def work() -> None:
        while taken := tokens(queue.take(0)[0]):
            computed.extend(taken)
            queue.answer([targets(token) for token in taken])

    work()
    assert computed == [0, 1, 2, 3]
    for token in range(9):  # one after the other, while more is sent ahead
        (future,) = queue.ask([everything[token]], 4)
        work()
        assert int(future.result(0).token_ids) == token
    assert computed == list(range(9))
    # What was given may be forgotten, and then has to be computed again.
    (again,) = queue.ask([everything[0]], 4)
    assert not again.done()
    # Nobody came for these, as a run has ended: after a while they make room.
    monkeypatch.setattr(teacher_queue, "KEPT_SECONDS", -1.0)
    queue.send_ahead([text(20), text(21), text(22), text(23), text(24)], 4)
    work()
    assert computed[-5:] == [20, 21, 22, 23, 24]


def test_prompts_are_answered_after_texts_and_before_what_nobody_waits_for() -> None:
    queue = TeacherQueue(prompts_at_once=2)
    queue.send_ahead([text(1)], 4)
    responses = queue.ask([prompt(2), prompt(3), prompt(2), prompt(4)], GREEDY)
    assert not queue.is_idle
    (target,) = queue.ask([text(5)], 4)
    order = []
    for _ in range(4):
        items, wanted = queue.take(0)
        order.append((tokens(items), wanted))
        is_text = wanted == 4
        queue.answer([targets(t) if is_text else [t, 510] for t in tokens(items)])
    assert order == [([5], 4), ([2, 3], GREEDY), ([4], GREEDY), ([1], 4)]
    assert int(target.result(0).token_ids) == 5
    assert [f.result(0) for f in responses] == [[2, 510], [3, 510], [2, 510], [4, 510]]
    assert queue.knows([prompt(2), prompt(3)], GREEDY)
    assert not queue.knows([prompt(2), prompt(9)], GREEDY)
    # One batch that cannot be answered is no end of the others.
    (refused,) = queue.ask([prompt(6)], GREEDY)
    queue.take(0)
    queue.answer([ValueError("too long")])
    with pytest.raises(ValueError, match="too long"):
        refused.result(0)
    (fine,) = queue.ask([prompt(7)], GREEDY)
    queue.take(0)
    queue.answer([[1]])
    assert fine.result(0) == [1]


def test_prompts_take_their_turn_where_texts_never_end() -> None:
    queue = TeacherQueue()
    queue.ask([prompt(99)], GREEDY)
    order = []
    for token in range(teacher_queue.TEXTS_IN_A_ROW + 2):
        queue.ask([text(token)], 4)
        items, _ = queue.take(0)
        order += tokens(items)
        queue.answer([targets(0) if isinstance(item, TeacherRow) else [1] for item in items])
    assert order.index(99) == teacher_queue.TEXTS_IN_A_ROW


def test_a_client_that_has_gone_is_no_obstacle() -> None:
    queue = TeacherQueue()
    gone, there = queue.ask([text(1), text(1)], 4)
    assert gone.cancel()
    queue.take(0)
    queue.answer([targets(1)])
    assert int(there.result(0).token_ids) == 1


def test_what_a_client_leaves_behind_is_dropped_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(teacher_queue, "time", SimpleNamespace(monotonic=lambda: now))
    queue = TeacherQueue()
    for future in queue.ask([text(1), text(2)], 4):
        future.cancel()
    now = 100.0  # the second one comes again, and is gone for good before there is an answer
    (again,) = queue.ask([text(2)], 4)
    queue.send_ahead([text(3)], 4)
    now = 130.0
    assert tokens(queue.take(0)[0]) == [2]
    assert again.cancel()
    queue.answer([targets(2)])
    assert tokens(queue.take(0)[0]) == [3]
    queue.answer([targets(3)])
    now += teacher_queue.ABANDONED_SECONDS
    queue.take(0)
    assert queue.knows([text(2), text(3)], 4)
    now += 1.0
    queue.take(0)
    assert not queue.knows([text(2)], 4)
    assert queue.knows([text(3)], 4)  # a rollout may take longer
    assert queue.is_idle


def test_the_output_layer_is_asked_for_once() -> None:
    queue = TeacherQueue()
    assert not queue.wants_head
    first, again = queue.ask_head(), queue.ask_head()
    assert queue.wants_head
    head = torch.ones(3, 2)
    queue.give_head(head)
    assert not queue.wants_head
    assert all(future.result(0) is head for future in (first, again, queue.ask_head()))
    broken = TeacherQueue()
    future = broken.ask_head()
    broken.fail(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        future.result(0)
