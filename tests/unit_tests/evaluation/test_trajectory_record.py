"""Order and texts of single tokens."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_dlm.evaluation.trajectory_record import token_texts, trajectory_record
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.types.trajectory import Trajectory
from tests.unit_tests.rollout.tiny_models import FULL_ATTENTION, GENERATION


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def test_bytes_of_a_split_character_are_named() -> None:
    tokenizer = byte_tokenizer()
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


AUTOREGRESSIVE = GenerationConfig.autoregressive(temperature=0.0, max_running_requests=1)


@pytest.mark.parametrize(
    ("generation", "steps", "blocks", "forwards"),
    [
        # After a prompt of 6, the first block of 4 has room for two tokens.
        (GENERATION, [2, 1, 1, 3, 2, 1, 1], [0, 0, 1, 1, 1, 1, 2], [2, 1, 3, 5, 4, 3, 6]),
        (FULL_ATTENTION, [2, 1, 1, 3, 2, 1, 4], [0] * 7, [2, 1, 1, 3, 2, 1, 4]),
        (AUTOREGRESSIVE, [0] * 7, [0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7]),
    ],
    ids=["block_causal", "full", "causal"],
)
def test_forwards_are_counted_through_the_blocks(
    generation: GenerationConfig, steps: list[int], blocks: list[int], forwards: list[int]
) -> None:
    trajectory = Trajectory(
        0,
        torch.arange(6),
        torch.arange(5),
        torch.tensor(steps[:5]),
        torch.arange(2),
        torch.tensor(steps[5:]),
        denoising_forwards=max(forwards),
        confidence=torch.linspace(0.1, 0.7, 7),
    )
    record = trajectory_record(
        trajectory, generation, byte_tokenizer(), setting="own", seed=1, prompt_index=2
    )
    response, tail = record["response"], record["tail"]
    assert [*response["block"], *tail["block"]] == blocks
    assert [*response["forward"], *tail["forward"]] == forwards
    assert [*response["step"], *tail["step"]] == [step or 1 for step in steps]
    assert (response["confidence"], tail["confidence"]) == ([0.1, 0.2, 0.3, 0.4, 0.5], [0.6, 0.7])
    assert "max_running_requests" not in record["settings"]
    assert record["settings"]["attention_pattern"] == generation.attention_pattern
