"""Requests and changes of the rollout server share its decoding thread."""

import threading
from typing import Any

from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.serving.api_error import ApiError
from megatron_dlm.serving.metrics import Metrics
from megatron_dlm.serving.rollout_queue import Change, Decoded, Request, RolloutQueue
from tests.unit_tests.rollout.tiny_models import (
    GENERATION,
    make_engine,
    make_prompts,
)

LENGTH = 24


class Decoding:
    """A queue with a real batch of three slots, and what it has told, in order."""

    def __init__(self, model: DiffusionGPTModel) -> None:
        self.engine = make_engine(model)
        batch = self.engine.open(3, [64] * 3, LENGTH)
        self.version = "1"
        self.queue = RolloutQueue(batch, self.engine.work, Metrics(), lambda: self.version, 60)
        self.told: list[tuple[str, Any]] = []

    def request(self, name: str) -> None:
        prompt = make_prompts([5])[0]
        told = self.told
        self.queue.submit(
            Request(name, prompt, GENERATION, 3, lambda result: told.append((name, result)))
        )

    def change(self, version: str, notify: Any = None) -> None:
        def apply() -> str:
            self.version = version
            return version

        self.queue.submit(Change(apply, notify or (lambda v: self.told.append(("change", v)))))

    def run(self) -> None:
        with self.engine.evaluating():
            self.queue.run()

    def versions(self) -> list[tuple[str, Any]]:
        return [
            (name, result.weight_version if isinstance(result, Decoded) else result)
            for name, result in self.told
        ]


def test_a_stopping_server_answers_in_order_what_came_before(model: DiffusionGPTModel) -> None:
    decoding = Decoding(model)
    decoding.request("before")
    decoding.change("2")
    decoding.request("after")
    decoding.queue.stop()
    decoding.run()
    assert decoding.versions() == [("before", "1"), ("change", "2"), ("after", "2")]
    decoding.request("late")
    name, error = decoding.told[-1]
    assert name == "late"
    assert isinstance(error, ApiError)
    assert error.status == 503


def test_requests_that_wait_in_a_pause_hold_no_change_back(model: DiffusionGPTModel) -> None:
    """A change that comes when the thread waits already, as nothing may be begun."""
    decoding = Decoding(model)
    changed = threading.Event()

    def notify(version: str) -> None:
        decoding.told.append(("change", version))
        changed.set()

    decoding.queue.paused = True
    decoding.request("paused")

    def client() -> None:
        decoding.change("2", notify)
        if not changed.wait(30):
            decoding.queue.stop()  # it would wait for ever
            return
        decoding.queue.resume()
        decoding.queue.stop()

    other = threading.Thread(target=client)
    other.start()
    decoding.run()
    other.join()
    assert decoding.versions() == [("change", "2"), ("paused", "2")]


def test_aborted_requests_end_and_others_go_on(model: DiffusionGPTModel) -> None:
    decoding = Decoding(model)
    for name in ("a1", "b1", "a2"):
        decoding.request(name)
    decoding.queue.abort("a")
    decoding.queue.stop()
    decoding.run()
    told = dict(decoding.told)
    assert told["a1"].trajectory is None
    assert told["a2"].trajectory is None
    assert len(told["b1"].trajectory.response_ids) > 0
