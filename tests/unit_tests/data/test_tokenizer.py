"""Special tokens are resolved from config and tokenizer, or refused."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config

from megatron_dlm.data.tokenizer import (
    SpecialTokens,
    differing_token,
    load_tokenizer,
    resolve_special_tokens,
)
from megatron_dlm.data.tokenizer_builder import save_tokenizer
from megatron_dlm.errors import UserError


def stock_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Ten words and Qwen's special tokens, without MASK: ids 0..12."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(10)}, unk_token="w0"))
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


QWEN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def test_declared_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert resolve_special_tokens(tokenizer, {"vocab_size": 512}, "x") == SpecialTokens(
        eos_token_id=510, pad_token_id=508, mask_token_id=511, vocab_size=512
    )


def test_mask_of_a_stock_tokenizer_is_the_first_free_id() -> None:
    tokens = resolve_special_tokens(stock_tokenizer(**QWEN), {"vocab_size": 14}, "x")
    assert tokens == SpecialTokens(
        eos_token_id=12, pad_token_id=10, mask_token_id=13, vocab_size=14
    )


def test_mask_by_name_without_declaration() -> None:
    tokenizer = stock_tokenizer(**QWEN)
    tokenizer.add_tokens(["<|MASK|>", "later"])
    assert resolve_special_tokens(tokenizer, {"vocab_size": 20}, "x").mask_token_id == 13


def test_config_wins() -> None:
    config = {"vocab_size": 20, "eos_token_id": 3, "mask_token_id": 17}
    tokens = resolve_special_tokens(stock_tokenizer(**QWEN), config, "x")
    assert tokens == SpecialTokens(eos_token_id=3, pad_token_id=10, mask_token_id=17, vocab_size=20)


@pytest.mark.parametrize(("configured", "expected"), [([10, 12], 12), ([10, 3], 10), ([], 12)])
def test_list_of_eos_ids(configured: list[int], expected: int) -> None:
    config = {"vocab_size": 20, "eos_token_id": configured}
    assert resolve_special_tokens(stock_tokenizer(**QWEN), config, "x").eos_token_id == expected


def test_pad_falls_back_to_eos() -> None:
    tokenizer = stock_tokenizer(eos_token="<|im_end|>")
    assert resolve_special_tokens(tokenizer, {"vocab_size": 20}, "x").pad_token_id == 12


@pytest.mark.parametrize(
    ("special", "config", "field", "words"),
    [
        ({}, {"vocab_size": 20}, "eos_token_id = None", "set eos_token"),
        (QWEN, {"vocab_size": 13}, "mask_token_id = None", "no free id below vocab_size 13"),
        (QWEN, {"vocab_size": 20, "eos_token_id": 20}, "eos_token_id = 20", "outside"),
        (QWEN, {"vocab_size": 20, "mask_token_id": 25}, "mask_token_id = 25", "outside"),
        (QWEN, {"vocab_size": 20, "mask_token_id": 12}, "mask_token_id = 12", "also the EOS"),
        (QWEN, {"vocab_size": 20, "mask_token_id": 10}, "mask_token_id = 10", "also the padding"),
    ],
)
def test_refused(
    special: dict[str, str], config: dict[str, object], field: str, words: str
) -> None:
    with pytest.raises(UserError) as error:
        resolve_special_tokens(stock_tokenizer(**special), config, "the/folder")
    message = str(error.value)
    assert message.startswith(f"{field}: ")
    assert words in message
    assert "the/folder" in message
    assert "\n" not in message


def test_load(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_load_refuses_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--load = .*nowhere'?: is not a folder; "):
        load_tokenizer(tmp_path / "nowhere", field="--load")


def test_load_refuses_a_folder_without_tokenizer(tmp_path: Path) -> None:
    Qwen3Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", json.dumps({"version": "1.0"})])
def test_load_refuses_a_broken_tokenizer(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def with_added(*tokens: str | AddedToken) -> PreTrainedTokenizerFast:
    tokenizer = stock_tokenizer(**QWEN)
    tokenizer.add_tokens(list(tokens))
    return tokenizer


SPECIAL = AddedToken("<|extra|>", special=True)
OTHER_SPECIAL = AddedToken("<|other|>", special=True)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([], [], None),
        (["<|MASK|>"], [], None),
        ([SPECIAL, "<|MASK|>"], [], None),
        ([SPECIAL], [SPECIAL, "<|MASK|>"], None),
        (["word"], [], "word"),
        (["<|MASK|>", "word"], ["<|MASK|>"], "word"),
        (["<|MASK|>"], [SPECIAL], "<|MASK|>"),  # two names of one id
        ([SPECIAL], [OTHER_SPECIAL], "<|extra|>"),
        ([SPECIAL, OTHER_SPECIAL], [OTHER_SPECIAL, SPECIAL], "<|extra|>"),  # exchanged
    ],
)
def test_tokenizers_share_a_vocabulary_up_to_special_tokens(
    one: list[str | AddedToken], other: list[str | AddedToken], expected: str | None
) -> None:
    assert differing_token(with_added(*one), with_added(*other)) == expected
    if expected is None or expected == "word":
        assert differing_token(with_added(*other), with_added(*one)) == expected


def test_exchanged_words_share_no_vocabulary() -> None:
    words = {f"w{9 - i}": i for i in range(10)}
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))
    )
    assert differing_token(other, stock_tokenizer()) in words
