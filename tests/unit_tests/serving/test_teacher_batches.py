"""A batch of the teacher that memory has no room for is computed in parts."""

from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dlm.config import Config
from megatron_dlm.errors import UserError
from megatron_dlm.parallel import ParallelGroups, initialized
from megatron_dlm.planning.layouts import Layout
from megatron_dlm.planning.memory import forward_bytes
from megatron_dlm.serving.teacher_queue import TeacherQueue
from megatron_dlm.serving.teacher_server import _answer_batch, _results
from megatron_dlm.stop_agreement import ranks_in_step
from megatron_dlm.teacher import answering
from megatron_dlm.teacher.answering import TextTeacher
from megatron_dlm.teacher.loading import load_teacher
from megatron_dlm.teacher.wire import Drawing, TeacherPrompt, TeacherRow, TeacherText
from megatron_dlm.training.model_source import open_model_source
from tests.distributed_tests.layouts import SP, TP
from tests.distributed_tests.spawn import run_distributed
from tests.limits import more_memory
from tests.tiny import save_random_model

GREEDY = Drawing(0.0, 0, 1.0, 0, (510,), 508, 511, 512)
LENGTHS = (10, 20, 90, 15, 30)
"""Tokens of prompts; the third one does not fit into a cache of 64."""


def answers(teacher: TextTeacher, items: list[Any], wanted: Any) -> list[Any]:
    """What becomes of one batch: a result each, or the text of its error."""
    queue = TeacherQueue()
    futures = queue.ask(items, wanted)
    assert len(queue.take(0)[0]) == len(items)
    _answer_batch(teacher, queue, items, wanted)
    errors = [future.exception(0) for future in futures]
    return [e if e else future.result(0) for e, future in zip(errors, futures, strict=True)]


def test_only_what_does_not_fit_by_itself_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_model_source(str(save_random_model(tmp_path / "dense")), "--load")
    texts = [torch.arange(5, 5 + length) for length in LENGTHS]
    prompts = [TeacherPrompt(i, text, 8) for i, text in enumerate(texts)]
    rows = [TeacherRow((TeacherText(text, 3),)) for text in texts]
    with initialized(Config.from_dict({"device": "cpu"})):
        roomy, small = (
            Config.from_dict({"device": "cpu", "max_total_tokens": most}) for most in (4096, 64)
        )
        model = load_teacher(source, roomy)
        teacher, cramped = (
            TextTeacher(model, config, ParallelGroups(), None) for config in (roomy, small)
        )
        expected, found = (answers(each, prompts, GREEDY) for each in (teacher, cramped))
        assert isinstance(found[2], UserError)
        assert "the cache holds 64 tokens" in str(found[2])
        assert found[:2] + found[3:] == expected[:2] + expected[3:]

        whole = answers(teacher, rows, 4)
        forward, most = answering.forward_hidden, 40
        forwards = []

        def limited(model: Any, rows: Any) -> Any:
            forwards.append(sum(len(row.token_ids) for row in rows))
            if forwards[-1] > most:
                fail_at[0]()
            return forward(model, rows)

        def of_device() -> None:
            raise torch.OutOfMemoryError("out of memory")

        def of_host() -> None:
            torch.empty(1 << 50, dtype=torch.uint8)  # more than a process can address

        fail_at = [of_device]
        monkeypatch.setattr(answering, "forward_hidden", limited)
        for fail_at[0] in (of_device, of_host):
            forwards.clear()
            parts = answers(teacher, rows, 4)
            assert max(forwards) > most
            assert "no memory for a single one" in str(parts[2])
            for index in (0, 1, 3, 4):
                for name, tensor in vars(whole[index]).items():
                    assert torch.equal(vars(parts[index])[name], tensor)
    (responses, targets, refused), others = run_distributed(
        _in_step, 2, tmp_path / "dense", prompts, rows
    )
    assert "the cache holds 64 tokens" in responses.pop(2)
    assert responses == expected[:2] + expected[3:]
    assert [len(found) for found in others] == [1, 1, 1]  # results are for the first one
    assert "no memory for a forward of 300000 tokens, about 0.2" in targets.pop(1)
    for found_row, row in zip(targets, whole, strict=True):
        assert torch.equal(found_row.token_ids, row.token_ids)
        torch.testing.assert_close(found_row.log_probs, row.log_probs, rtol=0, atol=1e-5)
    assert "no memory for a forward of 300001 tokens" in refused[1]
    assert refused[:1] + refused[2:] == expected[:1] + expected[1:2]


def _in_step(
    rank: int, folder: Path, prompts: list[TeacherPrompt], rows: list[TeacherRow]
) -> list[list[Any]]:
    """The same of two ranks that share a teacher, as results or texts of errors.

    Then the memory of one of them is limited, where one text is long.
    """
    values = {"device": "cpu", TP: 2, **SP, "chunked_prefill_size": 1 << 20}
    config = Config.from_dict({**values, "max_total_tokens": 64})
    long = torch.zeros(300_000, dtype=torch.int64)
    some_rows = [rows[0], TeacherRow((TeacherText(long, 3),)), *rows[1:]]
    some_prompts = [prompts[0], TeacherPrompt(9, long, 8), prompts[1]]
    with initialized(config):
        groups = ParallelGroups.from_parallel_state()
        source = open_model_source(str(folder), "--load")
        model = load_teacher(source, config)
        together = ranks_in_step(groups, timedelta(seconds=60))
        assert together is not None
        taken = partial(forward_bytes, config, source.architecture, Layout.of(config, 2))
        teachers = [
            TextTeacher(model, own, groups, together, taken)
            for own in (config, Config.from_dict(values))
        ]
        found = [_results(teachers[0], prompts, GREEDY)]
        with more_memory(100 << 20) if rank else nullcontext():
            found.append(_results(teachers[1], some_rows, 4))
            found.append(_results(teachers[1], some_prompts, GREEDY))
        return [[str(r) if isinstance(r, UserError) else r for r in each] for each in found]
