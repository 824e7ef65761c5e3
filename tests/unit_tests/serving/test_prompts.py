"""A prompt that cannot fit is refused before it is tokenised."""

from typing import Any

import pytest

from megatron_dlm.data.tokenizer import load_tokenizer
from megatron_dlm.serving.api_error import ApiError
from megatron_dlm.serving.prompts import Limits, PromptReader
from megatron_dlm.serving.requests import ChatRequest, CompletionRequest
from megatron_dlm.types.special_tokens import SpecialTokens
from tests.tiny import TOKENIZER

LIMITS = Limits(
    positions=16, max_prompt_length=15, max_response_length=15, default_response_length=8
)


@pytest.fixture(scope="module")
def reader() -> PromptReader:
    tokenizer = load_tokenizer(TOKENIZER)
    special_tokens = SpecialTokens(0, 0, len(tokenizer) - 1, vocab_size=len(tokenizer))
    return PromptReader({}, tokenizer, special_tokens, LIMITS)


@pytest.mark.parametrize("prompt", ["x" * 100_000, ["x", "x" * 100_000], [1] * 16, [[1], [1] * 16]])
def test_a_prompt_that_cannot_fit(reader: PromptReader, prompt: Any) -> None:
    with pytest.raises(ApiError) as caught:
        reader.check_size(CompletionRequest(model="m", prompt=prompt))
    error = caught.value
    assert (error.status, error.param, error.code) == (400, "prompt", "context_length_exceeded")


def test_a_chat_is_as_long_as_its_messages(reader: PromptReader) -> None:
    def chat(length: int) -> ChatRequest:
        messages = [{"role": "user", "content": "x" * length}] * 2
        return ChatRequest(model="m", messages=messages)

    reader.check_size(chat(15 // 2))
    with pytest.raises(ApiError, match="characters cannot be the 15 tokens"):
        reader.check_size(chat(100_000))


def test_whatever_fits_passes(reader: PromptReader) -> None:
    longest = max(reader._tokenizer.get_vocab(), key=len)
    for prompt in (longest * 15, [longest * 15] * 2, [1] * 15, [[1] * 15] * 2, []):
        reader.check_size(CompletionRequest(model="m", prompt=prompt))


@pytest.mark.parametrize("token_id", [10**30, 2**63, -1, -(10**30)])
def test_a_token_id_that_no_vocabulary_has(reader: PromptReader, token_id: int) -> None:
    for prompt in ([1, token_id], [[1], [token_id]]):
        with pytest.raises(ApiError) as caught:
            reader.read(CompletionRequest(model="m", prompt=prompt))
        assert (caught.value.status, caught.value.param) == (400, "prompt")


def test_values_that_cannot_be_written_name_their_field(reader: PromptReader) -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    for field, value, problem in (
        ("metadata", nested, "is nested too deeply"),
        ("user", "\ud800", "half of a surrogate pair"),
    ):
        request = CompletionRequest.model_construct(None, model="m", prompt="x", **{field: value})
        with pytest.raises(ApiError, match=f"^{field}: {problem}"):
            reader.read(request)
