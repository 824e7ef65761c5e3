"""Answers that are left before they have ended."""

from collections.abc import Iterator

import pytest

from megatron_dlm.config import ParallelConfig
from megatron_dlm.data.tokenizer import load_tokenizer
from megatron_dlm.evaluation.chat_session import ChatSession
from megatron_dlm.evaluation.generation import load_frozen_model
from megatron_dlm.evaluation.options import (
    InferenceArguments,
    InferenceConfig,
    resolve_inference,
)
from megatron_dlm.parallel import initialized
from megatron_dlm.types.trajectory import Trajectory
from tests.tiny import REPOSITORY

TINY = str(REPOSITORY / "examples" / "tiny" / "qwen3")


@pytest.fixture(scope="module")
def session() -> Iterator[ChatSession]:
    options = InferenceConfig(load=TINY, block_size=4, max_response_length=12)
    setup = resolve_inference(InferenceArguments(options, parallel=ParallelConfig(device="cpu")), 1)
    [generation] = setup.settings().values()
    with initialized(setup.config):
        yield ChatSession(load_frozen_model(setup), setup, generation, load_tokenizer(TINY))


def answered(session: ChatSession, question: str) -> list[int]:
    """The whole answer, and nothing of it in the chat."""
    *_, trajectory = session.answer(session.ask(question))
    session.take_back()
    assert isinstance(trajectory, Trajectory)
    return trajectory.response_ids.tolist()


def test_an_answer_that_is_open_is_not_mixed_with_the_next(session: ChatSession) -> None:
    expected = answered(session, "Ann has 5 cards. She buys 2.")
    first = session.answer(session.ask("Tom has 3 eggs."))
    next(first)
    session.take_back()
    second = session.answer(session.ask("Ann has 5 cards. She buys 2."))
    session.take_back()
    with pytest.raises(ValueError, match="an earlier answer is still being decoded"):
        next(second)
    first.close()
    assert answered(session, "Ann has 5 cards. She buys 2.") == expected


def test_an_answer_is_closed_at_its_end(session: ChatSession) -> None:
    expected = answered(session, "Tom has 3 eggs.")
    answer = session.answer(session.ask("Tom has 3 eggs."))
    session.take_back()
    while not isinstance(next(answer), Trajectory):
        pass
    answer.close()
    assert answered(session, "Tom has 3 eggs.") == expected
