"""Windows of a pretraining corpus in Megatron's indexed dataset format (`.bin` and `.idx`).

The documents are laid end to end in a seeded order and cut every `seq_length` tokens. A window has
the lengths of its documents, so that attention can keep them apart; the rest of a document that is
cut is a document of its own in the next window. No token is left out: the last window may be
shorter.
"""

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, get_bin_path, get_idx_path
from numpy.typing import NDArray

from megatron_dlm.data.fingerprint import add_ends
from megatron_dlm.data.sampler import shuffled_order
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Trajectory

_DOCUMENT_ORDER = (0, 1)
# A separate key: the order of windows is keyed by the epoch alone.

_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_HEADER = struct.Struct("<9sQBQQ")
# magic, version, type of a token, number of sequences, number of documents + 1

_TOKEN_TYPES = {kind.value: np.dtype(kind.name).itemsize for kind in DType if "int" in kind.name}
"""Bytes of a token by the code of its type."""


@dataclass(frozen=True)
class CorpusFile:
    """Identity of the corpus that a run reads.

    Attributes:
        path: The prefix, as the user wrote it.
        fingerprint: SHA-256 of the index, and of the size and the ends of the tokens.
    """

    path: str
    fingerprint: str


class CorpusDataset:
    """A corpus as N windows of `seq_length` tokens.

    Args:
        prefix: Path of the two files without `.bin` and `.idx`.
        seq_length: Tokens of a window.
        seed: Decides the order of documents.
        shuffle: False keeps the order of the files.
        special_tokens: MASK and ids outside the vocabulary are refused.
        field: The flag that the prefix came from, for error messages.

    Raises:
        UserError: The files do not exist, are damaged or hold no token.
    """

    def __init__(
        self,
        prefix: str,
        seq_length: int,
        *,
        seed: int,
        shuffle: bool,
        special_tokens: SpecialTokens,
        field: str = "--data-path",
    ) -> None:
        self._tokens = _open(prefix, field)
        self._field = field
        self._seq_length = seq_length
        self._vocab_size = special_tokens.vocab_size
        self._mask_token_id = special_tokens.mask_token_id
        starts = self._tokens.document_indices
        tokens_before = np.concatenate(
            ([0], np.cumsum(self._tokens.sequence_lengths, dtype=np.int64))
        )
        lengths = np.diff(tokens_before[starts])
        num_documents = len(lengths)
        self._order = (
            shuffled_order(num_documents, seed, *_DOCUMENT_ORDER)
            if shuffle
            else np.arange(num_documents)
        )
        self._ends = np.cumsum(lengths[self._order])
        self.num_tokens = int(self._ends[-1]) if num_documents else 0
        if self.num_tokens < 2:
            raise bad_value(field, prefix, "holds no two tokens", "preprocess a longer corpus")
        self.file = CorpusFile(prefix, _fingerprint(prefix))

    def __len__(self) -> int:
        return -(-self.num_tokens // self._seq_length)

    def sample(self, index: int, sample_index: int) -> Trajectory:
        """Return window `index` as global sample `sample_index` of a run.

        Raises:
            UserError: It holds MASK, or an id outside the vocabulary.
        """
        position = range(len(self))[index] * self._seq_length
        end = min(position + self._seq_length, self.num_tokens)
        rank = int(np.searchsorted(self._ends, position, side="right"))
        pieces: list[NDArray[np.int64]] = []
        while position < end:
            stop = min(end, int(self._ends[rank]))
            if stop > position:  # otherwise an empty document
                pieces.append(self._read(rank, position, stop))
            position, rank = stop, rank + 1
        token_ids = torch.from_numpy(np.concatenate(pieces))
        return Trajectory(
            sample_index=sample_index,
            prompt_ids=token_ids[:0],
            response_ids=token_ids,
            unmask_step=torch.zeros_like(token_ids),
            finish_reason="length",
            document_lengths=tuple(len(piece) for piece in pieces),
        )

    def _read(self, rank: int, position: int, stop: int) -> NDArray[np.int64]:
        """Tokens `position` to `stop` of the shuffled corpus, all of the document at `rank`."""
        document = int(self._order[rank])
        length = int(self._ends[rank] - (self._ends[rank - 1] if rank else 0))
        offset = position - (int(self._ends[rank]) - length)
        sequence = int(self._tokens.document_indices[document])
        # The sequences of a document are contiguous, so one read covers them.
        ids = self._tokens.get(sequence, offset, stop - position).astype(np.int64)
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            raise bad_value(
                f"{self._field}: document {document}",
                int(ids.max()),
                f"is no token of the model's vocabulary of {self._vocab_size}",
                "preprocess the corpus with the tokenizer of the model",
            )
        if (ids == self._mask_token_id).any():
            raise UserError(
                f"{self._field}: document {document} contains the MASK token"
                f" (id {self._mask_token_id}), which stands for text not yet written; remove it"
            )
        return ids


def _open(prefix: str, field: str) -> IndexedDataset:
    remedy = "name the prefix of the .bin and .idx file that megatron-dlm preprocess wrote"
    for path in (get_bin_path(prefix), get_idx_path(prefix)):
        if not Path(path).is_file():
            raise bad_value(field, prefix, f"there is no {path}", remedy)
    problem = _index_problem(Path(get_idx_path(prefix)))
    if problem is not None:
        raise bad_value(field, prefix, f"{prefix}.idx {problem}", "preprocess the corpus again")
    size = Path(get_bin_path(prefix)).stat().st_size
    if not size:
        raise bad_value(field, prefix, f"{prefix}.bin is empty", remedy)
    dataset = IndexedDataset(prefix)
    expected = int(dataset.sequence_lengths.sum(dtype=np.int64)) * dataset.index.dtype_size
    if size != expected:
        raise bad_value(
            field,
            prefix,
            f"{prefix}.bin has {size} bytes, and its index needs {expected}",
            "preprocess the corpus again",
        )
    return dataset


def _index_problem(path: Path) -> str | None:
    """What is wrong with an index; Megatron-Core's reader asserts, or reads past its end."""
    with path.open("rb") as file:
        header = file.read(_INDEX_HEADER.size)
        if len(header) < _INDEX_HEADER.size:
            return "is no index"
        magic, version, code, sequences, documents = _INDEX_HEADER.unpack(header)
        # A length (int32) and a pointer (int64) for each sequence, an int64 for each document.
        size = _INDEX_HEADER.size + 12 * sequences + 8 * documents
        if magic != _INDEX_MAGIC or version != 1 or path.stat().st_size != size:
            return "is damaged or no index"
        if code not in _TOKEN_TYPES:
            return f"is damaged: its tokens are of no type of whole numbers (code {code})"
        lengths = np.fromfile(file, np.int32, sequences)
        pointers = np.fromfile(file, np.int64, sequences)
        starts = np.fromfile(file, np.int64, documents)
    if (lengths < 0).any():
        return "is damaged: a sequence has a negative length"
    expected = np.cumsum(lengths, dtype=np.int64) - lengths
    if (pointers != expected * _TOKEN_TYPES[code]).any():
        return "is damaged: its sequences do not lie one after the other"
    if not len(starts) or starts[0] or starts[-1] != sequences or (np.diff(starts) < 0).any():
        return "is damaged: its documents are not made of its sequences"
    return None


def _fingerprint(prefix: str) -> str:
    with Path(get_idx_path(prefix)).open("rb") as index:
        digest = hashlib.file_digest(index, "sha256")
    # There may be terabytes of tokens: their number and both ends identify a corpus.
    add_ends(digest, Path(get_bin_path(prefix)))
    return digest.hexdigest()
