"""Texts of single tokens."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_dlm.evaluation.trajectory_record import token_texts


def test_bytes_of_a_split_character_are_named() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    for text in ("a é漢\n", "\ufffd~\x00"):
        token_ids = tokenizer(text)["input_ids"]
        expected = [chr(byte) if byte < 0x80 else f"<{byte:02X}>" for byte in text.encode("utf-8")]
        assert token_texts(token_ids, tokenizer) == expected
    assert token_texts([999], tokenizer) == ["<999>"]


def test_spaces_of_sentencepiece_stay() -> None:
    vocabulary = {"<unk>": 0, "<0xE6>": 1, "\u2581cat": 2, "s": 3, "\u2581": 4}
    bpe = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    assert token_texts([2, 3, 1, 4], tokenizer) == [" cat", "s", "<E6>", " "]
