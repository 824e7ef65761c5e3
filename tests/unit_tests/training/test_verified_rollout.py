from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from megatron_dlm.data.prompts import PromptDataset
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.training.verified_rollout import Verifier, generate_until_right
from megatron_dlm.types.trajectory import Prompt, Trajectory
from tests.tiny import TOKENIZER
from tests.unit_tests.rollout.tiny_models import (
    load_model,
    make_engine,
    make_prompts,
    save_tiny_model,
)

pytestmark = pytest.mark.usefixtures("single_process")


class RightAtTry:
    """Calls the n-th response to a prompt right, n being the prompt's `right_at`."""

    def __init__(self) -> None:
        self.asked: dict[int, int] = {}

    def check(self, prompts: PromptDataset) -> None:
        pass

    def rate(self, records: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> list[float]:
        assert len(records) == len(responses)
        for record in records:
            self.asked[record["id"]] = self.asked.get(record["id"], 0) + 1
        return [float(self.asked[record["id"]] >= record["right_at"]) for record in records]


class RecordingEngine:
    """A real engine; keeps what it was asked to decode."""

    def __init__(self, folder: Path) -> None:
        save_tiny_model(folder)
        self.engine = make_engine(load_model(folder))
        self.calls: list[list[int]] = []

    def generate_together(
        self, prompts: Sequence[Prompt], max_response_length: int, one_queue: bool
    ) -> list[Trajectory]:
        self.calls.append([prompt.sample_index for prompt in prompts])
        return self.engine.generate_together(prompts, max_response_length, one_queue=one_queue)

    def settled(self) -> AbstractContextManager[None]:
        return self.engine.settled()


def answer(
    engine: RecordingEngine, prompts: list[Prompt], longest: int, verifier: Verifier
) -> list[Trajectory]:
    return generate_until_right(
        engine,  # type: ignore[arg-type]
        prompts,
        longest,
        verifier,
        one_queue=True,
    )


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> RecordingEngine:
    return RecordingEngine(tmp_path_factory.mktemp("model"))


def test_wrong_answers_are_tried_again_with_other_noise(engine: RecordingEngine) -> None:
    right_at = [1, 3, 99, 2]
    prompts = [
        Prompt(p.sample_index, p.token_ids, {"id": p.sample_index, "right_at": n})
        for p, n in zip(make_prompts([5, 3, 4, 6]), right_at, strict=True)
    ]
    engine.calls.clear()
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    verifier = Verifier(RightAtTry(), tokenizer, max_tries=4, groups=ParallelGroups())
    result = answer(engine, prompts, 12, verifier)
    assert [t.sample_index for t in result] == [0, 1, 2, 3]
    assert [t.tries for t in result] == [1, 3, 4, 2]
    assert [t.correct for t in result] == [True, True, False, True]
    assert [len(call) for call in engine.calls] == [4, 3, 2, 1]
    keys = [key for call in engine.calls for key in call]
    assert len(set(keys)) == len(keys)
    # The first try is what a rollout without verification would have been; later ones differ.
    plain = engine.engine.generate(prompts, 12)
    assert torch.equal(result[0].response_ids, plain[0].response_ids)
    assert not torch.equal(result[1].response_ids, plain[1].response_ids)


def test_without_wrong_answers_there_is_one_rollout(engine: RecordingEngine) -> None:
    prompts = [Prompt(4, torch.tensor([1, 2]), {"id": 4, "right_at": 1})]
    engine.calls.clear()
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    verifier = Verifier(RightAtTry(), tokenizer, 8, ParallelGroups.from_parallel_state())
    answer(engine, prompts, 8, verifier)
    assert engine.calls == [[4]]
    engine.calls.clear()
    assert answer(engine, [], 8, verifier) == []
    assert engine.calls == []
