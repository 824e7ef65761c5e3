"""The tiny models' tokenizer, one for each file: some set its template."""

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_dlm.data.tokenizer import resolve_special_tokens
from megatron_dlm.data.tokenizer_builder import VOCAB_SIZE, build_tokenizer
from megatron_dlm.types.special_tokens import SpecialTokens


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def special_tokens(tokenizer: PreTrainedTokenizerFast) -> SpecialTokens:
    return resolve_special_tokens(tokenizer, {"vocab_size": VOCAB_SIZE}, "test")
