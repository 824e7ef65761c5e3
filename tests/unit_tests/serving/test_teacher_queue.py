"""Texts that wait for a teacher: order, copies, what is kept."""

import pytest
import torch

from megatron_dlm.serving import teacher_queue
from megatron_dlm.serving.teacher_queue import TeacherQueue
from megatron_dlm.teacher.wire import TeacherText
from megatron_dlm.types.teacher_targets import TopKTargets


def text(token: int, length: int = 2) -> TeacherText:
    return TeacherText(torch.full((length,), token), length - 1)


def targets(token: int) -> TopKTargets:
    return TopKTargets(torch.full((1, 1), token), torch.zeros(1, 1), torch.zeros(1))


def tokens(texts: list[TeacherText]) -> list[int]:
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
    monkeypatch.setattr(teacher_queue, "KEPT_BYTES", 40)
    monkeypatch.setattr(teacher_queue, "AHEAD_TOKENS", 8)
    queue = TeacherQueue()
    queue.send_ahead([text(1), text(2), text(3, 9), text(4), text(5), text(6)], 4)
    batches = [tokens(queue.take(0)[0])]
    queue.answer([targets(1), targets(2)])
    batches.append(tokens(queue.take(0)[0]))
    queue.answer([targets(4), targets(5)])
    assert batches == [[1, 2], [4, 5]]
    assert queue.take(0)[0] == []
    # A target is 8 + 4 + 4 bytes: the last two are kept.
    futures = queue.ask([text(1), text(2), text(4), text(5)], 4)
    assert [future.done() for future in futures] == [False, False, True, True]
    assert queue.waiting_texts == 2
    (long,) = queue.ask([text(7, 9)], 4)
    assert tokens(queue.take(0)[0]) == [1, 2]
    queue.fail(RuntimeError("broken"))
    for future in (futures[0], futures[1], long, *queue.ask([text(8)], 4)):
        with pytest.raises(RuntimeError, match="broken"):
            future.result(0)


def test_a_client_that_has_gone_is_no_obstacle() -> None:
    queue = TeacherQueue()
    gone, there = queue.ask([text(1), text(1)], 4)
    assert gone.cancel()
    queue.take(0)
    queue.answer([targets(1)])
    assert int(there.result(0).token_ids) == 1


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
