"""Corpus windows against the documents laid end to end by hand; damaged files are refused."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_dlm.data.corpus import CorpusDataset
from megatron_dlm.errors import UserError
from megatron_dlm.types.special_tokens import SpecialTokens
from tests.corpora import random_documents, write_corpus

SPECIAL = SpecialTokens(eos_token_id=510, pad_token_id=508, mask_token_id=511, vocab_size=512)


def corpus(
    prefix: Path, seq_length: int = 32, seed: int = 1, shuffle: bool = True
) -> CorpusDataset:
    return CorpusDataset(
        str(prefix),
        seq_length,
        seed=seed,
        shuffle=shuffle,
        special_tokens=SPECIAL,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 12))
def test_windows_are_the_documents_end_to_end(
    folder: Path, lengths: list[int], seq_length: int
) -> None:
    ids = iter(range(500))
    documents = [[next(ids) for _ in range(length)] for length in [*lengths, 2]]
    dataset = corpus(write_corpus(folder / "c", documents), seq_length, shuffle=False)
    windows = [dataset.sample(index, 7) for index in range(len(dataset))]
    joined = [token for document in documents for token in document]
    assert [token for window in windows for token in window.token_ids.tolist()] == joined
    assert all(len(window.token_ids) == seq_length for window in windows[:-1])
    of_token = [number for number, document in enumerate(documents) for _ in document]
    for index, window in enumerate(windows):
        own = of_token[index * seq_length : (index + 1) * seq_length]
        boundaries = [i for i in range(1, len(own)) if own[i] != own[i - 1]]
        assert torch.tensor(window.document_lengths).cumsum(0).tolist() == [*boundaries, len(own)]
        assert window.sample_index == 7
        assert not window.is_rollout


def test_the_seed_shuffles_whole_documents(folder: Path) -> None:
    documents = random_documents(40, seed=3)
    write_corpus(folder / "s", documents)

    def pieces(seed: int) -> list[list[int]]:
        window = corpus(folder / "s", seq_length=10**6, seed=seed).sample(0, 0)
        return [p.tolist() for p in window.token_ids.split(list(window.document_lengths))]

    assert sorted(pieces(1)) == sorted(documents)
    assert pieces(1) == pieces(1) != pieces(2)
    assert pieces(1) != documents


def test_documents_of_several_sequences_stay_whole(folder: Path) -> None:
    """As Megatron's own preprocessing with sentence splitting writes them."""
    builder = IndexedDatasetBuilder(str(folder / "m.bin"), dtype=np.uint16)
    builder.add_document([1, 2, 3, 4, 5], [2, 3])
    builder.add_document([6, 7], [2])
    builder.finalize(str(folder / "m.idx"))
    window = corpus(folder / "m", shuffle=False).sample(0, 0)
    assert window.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert window.document_lengths == (5, 2)
    assert corpus(folder / "m", 3, shuffle=False).sample(1, 0).token_ids.tolist() == [4, 5, 6]


def test_the_fingerprint_knows_lengths_and_tokens(folder: Path) -> None:
    prints = {
        corpus(write_corpus(folder / f"f{i}", documents)).file.fingerprint
        for i, documents in enumerate([[[1, 2], [3]], [[1], [2, 3]], [[1, 2], [4]], [[1, 2], [3]]])
    }
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("token", "problem"), [(511, "contains the MASK token"), (512, "vocabulary of 512")]
)
def test_tokens_that_cannot_be(folder: Path, token: int, problem: str) -> None:
    dataset = corpus(write_corpus(folder / f"bad{token}", [[1, 2, token]]))
    with pytest.raises(UserError, match=f"--data-path: document 0.*{problem}"):
        dataset.sample(0, 0)


def test_files_that_cannot_be(folder: Path) -> None:
    with pytest.raises(UserError, match=r"--data-path = .*there is no .*nowhere.bin"):
        corpus(folder / "nowhere")
    prefix = write_corpus(folder / "cut", random_documents(9, seed=1))
    data = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").write_bytes(data[:-4])
    with pytest.raises(UserError, match=r"cut.bin has \d+ bytes, and its index needs \d+"):
        corpus(prefix)
    index = Path(f"{prefix}.idx").read_bytes()
    for broken in (b"nonsense" * 9, index[:-8]):
        Path(f"{prefix}.idx").write_bytes(broken)
        with pytest.raises(UserError, match="idx is damaged or no index"):
            corpus(prefix)
    Path(f"{prefix}.bin").write_bytes(data)
    numbers = {
        17: (struct.pack("<B", 7), "no type of whole numbers"),
        34: (struct.pack("<i", -5), "negative length"),
        34 + 9 * 4 + 8: (struct.pack("<q", 4), "one after the other"),
        len(index) - 8: (struct.pack("<q", 3), "not made of its sequences"),
    }
    for position, (number, problem) in numbers.items():
        end = position + len(number)
        Path(f"{prefix}.idx").write_bytes(index[:position] + number + index[end:])
        with pytest.raises(UserError, match=f"idx is damaged: .*{problem}"):
            corpus(prefix)
    with pytest.raises(UserError, match=r"empty.bin is empty"):
        corpus(write_corpus(folder / "empty", [[]]))
    with pytest.raises(UserError, match="holds no two tokens"):
        corpus(write_corpus(folder / "short", [[3]]))
