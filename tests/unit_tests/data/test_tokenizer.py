"""Special tokens are resolved from config and tokenizer, or refused."""

import json
import logging
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config

from megatron_dlm.data.tokenizer import differing_token, load_tokenizer, resolve_special_tokens
from megatron_dlm.data.tokenizer_builder import save_tokenizer
from megatron_dlm.errors import UserError
from megatron_dlm.types.special_tokens import SpecialTokens


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


def test_mask_that_only_the_config_knows() -> None:
    config = {"vocab_size": 20, "mask_token_id": 17, "pad_token_id": 3}
    tokens = resolve_special_tokens(stock_tokenizer(**QWEN), config, "x")
    assert tokens == SpecialTokens(
        eos_token_id=12, pad_token_id=10, mask_token_id=17, vocab_size=20
    )


@pytest.mark.parametrize(
    ("configured", "generated", "expected"),
    [
        (None, None, (12,)),
        ([], [], (12,)),
        (12, None, (12,)),
        (10, [12, 10], (12, 10)),  # SDAR-4B-Chat and Qwen3
        (10, 12, (12, 10)),
        (10, None, (12, 10)),
        ([10, 3], None, (12, 10, 3)),
        (3, None, (12, 3)),
        (3, [12, 10], (12, 10)),  # generation_config.json overrides an ordinary token
        (None, [3, 4], (12, 3, 4)),
    ],
)
def test_every_listed_id_ends_a_response(
    configured: object, generated: object, expected: tuple[int, ...]
) -> None:
    tokens = resolve_special_tokens(
        stock_tokenizer(**QWEN),
        {"vocab_size": 20, "eos_token_id": configured},
        "x",
        generation_config={"eos_token_id": generated},
    )
    assert tokens.eos_token_id == 12  # what the chat template writes
    assert tokens.eos_token_ids == expected


def test_eos_of_the_files_where_the_tokenizer_has_none() -> None:
    config = {"vocab_size": 20, "eos_token_id": 10}
    tokenizer = stock_tokenizer(pad_token="<|endoftext|>")
    tokens = resolve_special_tokens(
        tokenizer, config, "x", generation_config={"eos_token_id": [12, 10]}
    )
    assert (tokens.eos_token_id, tokens.eos_token_ids) == (12, (12, 10))


@pytest.mark.parametrize("declared", [True, False])
def test_mask_of_config_and_tokenizer_differ(declared: bool) -> None:
    tokenizer = stock_tokenizer(**QWEN)
    tokenizer.add_tokens(["<|MASK|>"])
    if declared:
        tokenizer.mask_token = "<|MASK|>"
    config = {"vocab_size": 20, "mask_token_id": 17}
    with pytest.raises(UserError) as error:
        resolve_special_tokens(tokenizer, config, "the/folder", config_file="a/config.json")
    message = str(error.value)
    assert message.startswith("a/config.json: mask_token_id = 17: ")
    assert "the tokenizer in the/folder has '<|MASK|>' as 13" in message


def test_mask_of_generation_config() -> None:
    """Generation with an exported folder takes it from there."""
    stated = {"generation_config": {"mask_token_id": 17}, "config_file": "a/config.json"}
    plain, config = stock_tokenizer(**QWEN), {"vocab_size": 20}
    assert resolve_special_tokens(plain, config, "x", **stated).mask_token_id == 17
    with pytest.raises(UserError) as error:
        resolve_special_tokens(plain, config | {"mask_token_id": 16}, "x", **stated)
    named = "a/generation_config.json: mask_token_id = 17: but "
    assert str(error.value).startswith(f"{named}a/config.json says 16")
    plain.add_tokens(["<|MASK|>"])
    with pytest.raises(UserError) as error:
        resolve_special_tokens(plain, config, "the/folder", **stated)
    assert str(error.value).startswith(f"{named}the tokenizer in the/folder has '<|MASK|>' as 13")


def test_pad_falls_back_to_eos() -> None:
    tokenizer = stock_tokenizer(eos_token="<|im_end|>")
    assert resolve_special_tokens(tokenizer, {"vocab_size": 20}, "x").pad_token_id == 12


@pytest.mark.parametrize(
    ("special", "config", "field", "words"),
    [
        ({}, {"vocab_size": 20}, "eos_token_id = None", "set eos_token"),
        (QWEN, {"vocab_size": 13}, "mask_token_id = None", "no free id below vocab_size 13"),
        (QWEN, {"vocab_size": 12, "mask_token_id": 11}, "eos_token_id = 12", "outside"),
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


@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id", "bos_token_id", "mask_token_id"])
@pytest.mark.parametrize("value", [20, 2**63, -1, "12", 1.0, True, [1, [2]]])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_ids_that_are_none(key: str, value: object, name: str) -> None:
    values = {key: value}
    config = {"vocab_size": 20, **(values if name == "config.json" else {})}
    with pytest.raises(UserError) as error:
        resolve_special_tokens(
            stock_tokenizer(**QWEN),
            config,
            "the/folder",
            generation_config=values if name != "config.json" else {},
            config_file="a/config.json",
        )
    assert str(error.value).startswith(f"a/{name}: {key} = ")


def test_load(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_load_asks_and_warns_of_nothing(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A folder with modelling code of its own, as exports are; a tokenizer needs none of it.
    tokenizer.save_pretrained(tmp_path)
    config = {"model_type": "sdar", "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert warned == []
    assert capsys.readouterr().out == ""


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
    with pytest.raises(UserError, match=r"cannot be loaded|is not valid JSON") as error:
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
