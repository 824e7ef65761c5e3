"""What a teacher's server and its clients exchange: texts, targets, and who the teacher is.

Bodies are safetensors: tensors as they lie in memory, and nothing that runs code when it is read.

N: tokens of all texts; n: predictions of all texts; k: tokens of a distribution.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from megatron_dlm.types.teacher_targets import TopKTargets
from megatron_dlm.types.trajectory import Trajectory

IDENTITY_PATH = "/v1/teacher"
TARGETS_PATH = "/v1/targets"
FINGERPRINT_HEADER = "X-Teacher-Fingerprint"
"""Of a request for targets: the teacher that the client expects."""


@dataclass(frozen=True, eq=False)
class TeacherText:
    """Tokens that a teacher reads, of which the last ones are to predict what follows them.

    Attributes:
        token_ids: [C] int64.
        first: The first token whose prediction is wanted; those of all later ones are too.
    """

    token_ids: Tensor
    first: int

    @classmethod
    def of(cls, trajectory: Trajectory) -> Self:
        """What predicts a response: its prompt, at least one token, and all its tokens but one."""
        if len(trajectory.prompt_ids) == 0:
            raise ValueError("a trajectory without a prompt has no first-token target")
        return cls(trajectory.token_ids[:-1], len(trajectory.prompt_ids) - 1)

    def __len__(self) -> int:
        """Number of predictions."""
        return max(len(self.token_ids) - self.first, 0)

    @property
    def digest(self) -> bytes:
        """Tells it from any other text."""
        tokens = self.token_ids.numpy().tobytes()
        return hashlib.blake2b(tokens, digest_size=16, person=b"%d" % self.first).digest()


def pack_texts(texts: Sequence[TeacherText], k: int) -> bytes:
    """The body of a request for the k most likely tokens of each prediction."""
    return save(
        {
            "token_ids": torch.cat([text.token_ids for text in texts]).int(),
            "lengths": torch.tensor([len(text.token_ids) for text in texts]),
            "first": torch.tensor([text.first for text in texts]),
            "k": torch.tensor([k]),
        }
    )


def unpack_texts(body: bytes) -> tuple[list[TeacherText], int]:
    """The inverse of `pack_texts`.

    Raises:
        ValueError: The body is none, or its numbers contradict each other.
    """
    tensors = _loaded(body, {"token_ids": torch.int32, "lengths": torch.int64}, {"first", "k"})
    lengths, first, k = (tensors[name].tolist() for name in ("lengths", "first", "k"))
    tokens = tensors["token_ids"].long()
    if len(lengths) != len(first) or len(k) != 1:
        raise ValueError(f"{len(lengths)} lengths, {len(first)} first tokens, {len(k)} numbers k")
    if any(not 0 <= f < length for f, length in zip(first, lengths, strict=True)):
        raise ValueError("a text is empty, or its first prediction is outside it")
    if sum(lengths) != len(tokens):
        raise ValueError(f"lengths of {sum(lengths)} tokens in all, and {len(tokens)} tokens")
    parts = tokens.split(lengths)
    return [TeacherText(t, f) for t, f in zip(parts, first, strict=True)], k[0]


def pack_targets(targets: Sequence[TopKTargets]) -> bytes:
    """The body of an answer."""
    parts: dict[str, Tensor] = {}
    for name in ("token_ids", "log_probs", "log_rest"):
        parts[name] = torch.cat([getattr(part, name) for part in targets])
    return save(parts)


def unpack_targets(body: bytes, counts: Sequence[int], k: int) -> list[TopKTargets]:
    """The inverse of `pack_targets`.

    Args:
        body: The answer.
        counts: Predictions of each text that was sent.
        k: That was sent.

    Raises:
        ValueError: The body does not answer these.
    """
    kinds = {"token_ids": torch.int32, "log_probs": torch.float32, "log_rest": torch.float32}
    tensors = _loaded(body, kinds)
    total = sum(counts)
    shapes = [tuple(tensors[name].shape) for name in kinds]
    if shapes != [(total, k), (total, k), (total,)]:
        raise ValueError(f"targets of shapes {shapes} for {total} predictions of {k} tokens")
    columns = (tensors[name].split(list(counts)) for name in kinds)
    return [TopKTargets(*part) for part in zip(*columns, strict=True)]


def _loaded(
    body: bytes, kinds: Mapping[str, torch.dtype], others: Collection[str] = ()
) -> dict[str, Tensor]:
    try:
        tensors = load(body)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"no safetensors ({error})") from error
    expected = {**kinds, **dict.fromkeys(others, torch.int64)}
    found = {name: tensor.dtype for name, tensor in tensors.items()}
    if found != expected:
        raise ValueError(f"tensors {found} in place of {expected}")
    return tensors


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as far as another one is compared with it (`data.tokenizer.differing_token`).

    Attributes:
        ids: Of all tokens.
        special: Ids of the special ones.
    """

    ids: dict[str, int]
    special: tuple[int, ...] = ()

    def get_vocab(self) -> dict[str, int]:
        """The ids by token."""
        return self.ids

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """The special tokens by id."""
        return {token_id: SimpleNamespace(special=True) for token_id in self.special}


@dataclass(frozen=True)
class TeacherIdentity:
    """Who a server's teacher is.

    Attributes:
        fingerprint: Of its weights (`ModelWeights.fingerprint`).
        name: Where the server has it from, for people.
        precision: That it computes in.
        hf_config: Its config.json.
        generation_config: Its generation_config.json; empty without one.
        vocabulary: Of its tokenizer; None where its folder has none.
    """

    fingerprint: str
    name: str
    precision: str
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]
    vocabulary: Vocabulary | None

    def to_json(self) -> dict[str, Any]:
        """A JSON object; the inverse of `from_json`."""
        own, vocabulary = dict(vars(self)), self.vocabulary
        if vocabulary is not None:
            own["vocabulary"] = {"ids": vocabulary.ids, "special": list(vocabulary.special)}
        return own

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read a JSON object.

        Raises:
            ValueError: It is none of a teacher.
        """
        try:
            vocabulary = values["vocabulary"]
            if vocabulary is not None:
                vocabulary = Vocabulary(dict(vocabulary["ids"]), tuple(vocabulary["special"]))
            return cls(**{**values, "vocabulary": vocabulary})
        except (KeyError, TypeError) as error:
            raise ValueError(f"no identity of a teacher ({error})") from error
