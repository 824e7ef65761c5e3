"""A `tokenizer.model` alone is a tokenizer: SentencePiece's ids and the tokens of JSON files."""

import io
import json
import random
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_dlm.conversion.tokenizer_files import copy_tokenizer, register_mask_token
from megatron_dlm.data.sentencepiece_model import with_tokenizer_json
from megatron_dlm.data.tokenizer import load_tokenizer, resolve_special_tokens
from megatron_dlm.errors import UserError

CHARACTERS = "abcdefgh"
# As Llama 2's and Mistral's, and with SentencePiece's own defaults.
LIKE_LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
LIKE_LLAMA |= {"byte_fallback": True, "vocab_size": 380}
BY_DEFAULT = {"vocab_size": 110}
TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


def train(folder: Path, kind: str = "bpe", **options: object) -> Path:
    """A tokenizer of random words in a folder of its own."""
    draw = random.Random(0)
    words = ["".join(draw.choices(CHARACTERS, k=draw.randint(1, 6))) for _ in range(200)]
    sentences = [" ".join(draw.choices(words, k=12)) for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type=kind,
        minloglevel=2,
        **{**LIKE_LLAMA, **options},
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def oracle(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=[LIKE_LLAMA, BY_DEFAULT], ids=["llama", "default"])
def trained(
    request: pytest.FixtureRequest, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    options = request.param
    if options is BY_DEFAULT:
        options = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
        options |= {"byte_fallback": False, **BY_DEFAULT}
    return train(tmp_path_factory.mktemp("trained"), kind, **options)


TEXTS = st.text(st.sampled_from(CHARACTERS + "   \n\té世ﬁ\uff04Z9.<"), max_size=60) | st.text(
    max_size=20
)


def test_ids_are_those_of_sentencepiece(trained: Path) -> None:
    reference, tokenizer = oracle(trained), load_tokenizer(trained)
    assert len(tokenizer) == reference.vocab_size()
    assert tokenizer.get_vocab() == {
        reference.id_to_piece(i): i for i in range(reference.vocab_size())
    }

    @settings(max_examples=300, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        expected = reference.encode(text)
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert found == expected
        if reference.unk_id() not in expected:
            assert tokenizer.decode(found) == reference.decode(expected)

    check()


def write(file: Path, value: object) -> None:
    file.write_text(json.dumps(value))


def test_the_json_files_beside_it_are_read(tmp_path: Path) -> None:
    folder = train(tmp_path / "model")
    size = oracle(folder).vocab_size()
    bare = load_tokenizer(folder)
    assert (bare.unk_token_id, bare.bos_token_id, bare.eos_token_id) == (0, 1, 2)
    assert bare("abc")["input_ids"] == oracle(folder).encode("abc")

    write(folder / "added_tokens.json", {"<|MASK|>": size})
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "chat_template": TEMPLATE,
        "eos_token": {"content": "<|end|>", "__type": "AddedToken"},
        "added_tokens_decoder": {str(size + 1): {"content": "<|end|>", "special": True}},
    }
    write(folder / "tokenizer_config.json", config)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.name_or_path == str(folder)
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (size + 1, 1)
    abc = oracle(folder).encode("abc")
    assert tokenizer("abc")["input_ids"] == [1, *abc]
    assert tokenizer("abc<|end|>", add_special_tokens=False)["input_ids"] == [*abc, size + 1]
    chat = [{"role": "user", "content": "abc"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "[abc]"
    special = resolve_special_tokens(tokenizer, {"vocab_size": size + 8}, "here")
    assert (special.mask_token_id, special.eos_token_ids) == (size, (size + 1,))

    write(folder / "tokenizer_config.json", config | {"add_bos_token": False})
    (folder / "chat_template.jinja").write_text("<{{ messages[0].content }}>")
    tokenizer = load_tokenizer(folder)
    assert tokenizer("abc")["input_ids"] == abc
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<abc>"


@pytest.mark.parametrize("mask_token", [None, "<|mask|>"])
def test_an_export_has_a_tokenizer_json_with_mask(
    trained: Path, tmp_path: Path, mask_token: str | None
) -> None:
    reference = oracle(trained)
    mask = reference.vocab_size()
    copy_tokenizer(trained, tmp_path)
    register_mask_token(tmp_path, mask, mask_token)
    assert {file.name for file in tmp_path.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for tokenizer in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert tokenizer.mask_token_id == mask
        assert tokenizer.mask_token == (mask_token or "<|MASK|>")
        text = "abc de\nZ"
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text)
        masked = tokenizer(f"{text}{tokenizer.mask_token}", add_special_tokens=False)
        assert masked["input_ids"] == [*reference.encode(text), mask]


def _refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = _refusal(tmp_path)
    assert "holds no tokenizer" in empty
    assert "tokenizer.json or tokenizer.model" in empty
    file = tmp_path / "tokenizer.model"
    # The second is what Llama 3's original folder has under this name.
    for content in (b"", b"IQ== 0\nIg== 1\n", b"\xff" * 100):
        file.write_bytes(content)
        assert f"--tokenizer = '{file}': is no SentencePiece model" in _refusal(tmp_path)
    train(tmp_path, "char", byte_fallback=False, vocab_size=12)
    assert "is no unigram or byte-pair encoding" in _refusal(tmp_path)
    size = oracle(train(tmp_path)).vocab_size()
    write(tmp_path / "added_tokens.json", {"<pad>": size + 1})
    assert f"'<pad>' cannot be added as {size + 1}" in _refusal(tmp_path)
    (tmp_path / "added_tokens.json").unlink()
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert "pip install sentencepiece protobuf" in _refusal(tmp_path)


def test_a_tokenizer_json_beside_it_is_what_counts(tmp_path: Path) -> None:
    copy_tokenizer(train(tmp_path / "model"), tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with with_tokenizer_json(tmp_path, "--tokenizer") as folder:
        assert folder == tmp_path
    load_tokenizer(tmp_path)
