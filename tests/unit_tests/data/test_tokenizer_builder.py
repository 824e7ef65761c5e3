"""The tiny tokenizer loses no text, splits digits, and is the committed one."""

from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config

from megatron_dlm.data.arithmetic import examples
from megatron_dlm.data.tokenizer_builder import (
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    build_tokenizer,
    main,
    save_tokenizer,
)

EXAMPLES = Path(__file__).parents[3] / "examples" / "tiny"


def test_special_tokens_have_the_highest_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == VOCAB_SIZE
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(VOCAB_SIZE - len(SPECIAL_TOKENS), VOCAB_SIZE))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (ids[0], ids[2])
    assert tokenizer.mask_token_id == ids[3]


@pytest.mark.parametrize("folder", ["qwen3", "qwen3_moe"])
def test_committed_tokenizer_is_the_built_one(folder: str, tmp_path: Path) -> None:
    save_tokenizer(build_tokenizer(), tmp_path)
    for file in tmp_path.iterdir():
        committed = EXAMPLES / folder / file.name
        assert committed.read_bytes() == file.read_bytes(), f"rebuild {committed}"


@given(text=st.text())
@settings(deadline=None)
def test_any_text_survives(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("12 + 345", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in ids] == ["1", "2", " +", " ", "3", "4", "5"]


def test_chat_template_is_chatml(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi?"},
    ]
    text = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    prompted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompted == text + "<|im_start|>assistant\n"


def test_loads_beside_a_qwen3_config(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """AutoTokenizer must not replace it by the class it knows for the model type."""
    main(["--output", str(tmp_path)])
    Qwen3Config(vocab_size=VOCAB_SIZE).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for example in islice(examples("heldout", 1), 50):
        ids = tokenizer.apply_chat_template(example["messages"])["input_ids"]
        assert loaded.apply_chat_template(example["messages"])["input_ids"] == ids
    assert loaded.eos_token_id == tokenizer.eos_token_id
    assert loaded.mask_token_id == tokenizer.mask_token_id


def test_problems_are_short(tokenizer: PreTrainedTokenizerFast) -> None:
    """The quickstart's length limits rest on these bounds."""
    for example in islice(examples("heldout", 2), 1000):
        prompt = tokenizer.apply_chat_template(example["messages"], add_generation_prompt=True)
        assert len(prompt["input_ids"]) <= 64
        assert len(tokenizer(example["response"])["input_ids"]) + 1 <= 40


def test_refuses_a_vocabulary_without_room_for_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output", str(tmp_path), "--vocab-size", "200"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --vocab-size = 200: ")
    assert "at least 260" in error
