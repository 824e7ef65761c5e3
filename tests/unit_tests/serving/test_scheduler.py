"""Jobs share the decoding thread: what one of them does is nothing to the others."""

from typing import Any

import pytest

from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.serving.jobs import Event, Failed, Finished, Job, Text
from megatron_dlm.serving.metrics import Metrics
from megatron_dlm.serving.scheduler import Scheduler
from megatron_dlm.types.trajectory import Prompt
from tests.unit_tests.rollout.tiny_models import (
    GENERATION,
    make_engine,
    make_prompts,
)

LENGTH = 24


class Decoding:
    """A scheduler with a real batch of three slots, run by the thread of the test."""

    def __init__(self, model: DiffusionGPTModel) -> None:
        self.engine = make_engine(model)
        self.metrics = Metrics()
        self.batch = self.engine.open(3, [64] * 3, LENGTH)
        self.scheduler = Scheduler(
            self.batch, self.engine.work, lambda ids: " ".join(map(str, ids)), self.metrics, 60
        )

    @property
    def forwards(self) -> float:
        value = self.metrics.registry.get_sample_value("megatron_dlm_forwards_total")
        assert value is not None
        return value

    def job(self, events: list[Event], **changes: Any) -> Job:
        values = {
            "read": lambda: make_prompts([5]),
            "n": 1,
            "generation": GENERATION,
            "seed": 3,
            "stops": [],
            "notify": events.append,
        }
        return Job(**{**values, **changes})

    def run(self) -> None:
        with self.engine.evaluating():
            self.scheduler.run()


def texts(events: list[Event], index: int) -> str:
    return "".join(e.text for e in events if isinstance(e, Text) and e.index == index)


def test_an_error_in_one_job_leaves_the_others_alone(
    model: DiffusionGPTModel, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreadable() -> list[Prompt]:
        raise OverflowError("of reading")

    decoding = Decoding(model)
    events: dict[str, list[Event]] = {name: [] for name in ("unread", "unplaced", "good", "alone")}
    decoding.scheduler.submit(decoding.job(events["unread"], read=unreadable))
    # Its prompt is in the cache's books already when the slot refuses the seed.
    decoding.scheduler.submit(decoding.job(events["unplaced"], n=2, seed="of placing"))
    decoding.scheduler.submit(decoding.job(events["good"]))
    decoding.scheduler.stop()
    decoding.run()
    for name in ("unread", "unplaced"):
        failed = events[name][-1]
        assert isinstance(failed, Failed)
        assert failed.error.status == 500
        assert failed.error.type == "server_error"
    assert isinstance(events["good"][-1], Finished)
    logged = capsys.readouterr().err
    assert "OverflowError: of reading" in logged
    assert "TypeError" in logged
    # The same as without them; and all that they held is free.
    other = Decoding(model)
    other.scheduler.submit(other.job(events["alone"]))
    other.scheduler.stop()
    other.run()
    assert events["good"] == events["alone"]
    free, expected = (
        [group.context.pool.num_free for group in each.batch._slot_groups]  # type: ignore[attr-defined]
        for each in (decoding, other)
    )
    assert free == expected


def test_n_does_not_change_the_first_responses(model: DiffusionGPTModel) -> None:
    decoding = Decoding(model)
    one, three = [], []
    prompts = make_prompts([5, 7])
    for events, n in ((one, 1), (three, 3)):
        job = decoding.job(events, read=lambda: prompts, n=n)
        decoding.scheduler.submit(job)
    decoding.scheduler.stop()
    decoding.run()
    assert [texts(one, 0), texts(one, 1)] == [texts(three, 0), texts(three, 3)]
    assert len({texts(three, index) for index in range(6)}) == 6


def test_one_job_is_read_between_two_forwards(model: DiffusionGPTModel) -> None:
    """Streams go on while many requests come at once."""
    decoding = Decoding(model)
    read_at: list[float] = []

    def read() -> list[Prompt]:
        read_at.append(decoding.forwards)
        return make_prompts([5])

    def notify(event: Event) -> None:
        if isinstance(event, Text) and not decoding.scheduler.stopping:
            for _ in range(3):
                decoding.scheduler.submit(decoding.job([], read=read))
            decoding.scheduler.stop()

    decoding.scheduler.submit(decoding.job([], notify=notify))
    decoding.run()
    first = read_at[0]
    assert read_at == [first, first + 1, first + 2]
