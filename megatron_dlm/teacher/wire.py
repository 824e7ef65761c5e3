"""What a teacher's server and its clients exchange: texts, targets, and who the teacher is.

Bodies are safetensors: tensors as they lie in memory, and nothing that runs code when it is read.

N: tokens of all texts; n: predictions of all texts; k: tokens of a distribution.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from megatron_dlm.config.teacher_options import TeacherPrecision
from megatron_dlm.types.teacher_targets import HiddenTargets, TeacherTargets, TopKTargets
from megatron_dlm.types.trajectory import Trajectory

IDENTITY_PATH = "/v1/teacher"
TARGETS_PATH = "/v1/targets"
HEAD_PATH = "/v1/head"
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
    """The body of a request for the k most likely tokens of each prediction; 0: hidden states."""
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
    tensors = _loaded(body)
    kinds = {name: tensor.dtype for name, tensor in tensors.items()}
    expected = dict.fromkeys(("lengths", "first", "k"), torch.int64)
    if kinds != {**expected, "token_ids": torch.int32}:
        raise ValueError(f"tensors {kinds}")
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


def pack_targets(targets: Sequence[TeacherTargets]) -> bytes:
    """The body of an answer; targets of one kind, at least one."""
    whole = TeacherTargets.cat(targets)
    return save({name: tensor.contiguous() for name, tensor in vars(whole).items()})


def unpack_targets(body: bytes, counts: Sequence[int], k: int) -> list[TeacherTargets]:
    """The inverse of `pack_targets`.

    Args:
        body: The answer.
        counts: Predictions of each text that was sent.
        k: That was sent; 0: the answer is hidden states.

    Raises:
        ValueError: The body does not answer these.
    """
    total = sum(counts)
    tensors = _loaded(body)
    found = {name: tuple(tensor.shape[:1]) for name, tensor in tensors.items()}
    names = ("token_ids", "log_probs", "log_rest") if k else ("hidden",)
    if found != dict.fromkeys(names, (total,)):
        raise ValueError(f"targets {found} for {total} predictions of {k} tokens")
    whole: TeacherTargets
    if k == 0:
        whole = HiddenTargets(tensors["hidden"])
    else:
        whole = TopKTargets(*(tensors[name] for name in names))
        kinds = tuple(tensors[name].dtype for name in names)
        of_each = tensors["token_ids"].shape[1:] + tensors["log_probs"].shape[1:]
        if kinds != (torch.int32, torch.float32, torch.float32) or of_each != (k, k):
            raise ValueError(f"targets of {kinds} and {tuple(of_each)} tokens, in place of {k}")
    ends = list(accumulate(counts, initial=0))
    return [whole[slice(*pair)] for pair in pairwise(ends)]


def pack_head(head: Tensor) -> bytes:
    """The body of an answer with rows of the output layer."""
    return save({"head": head.contiguous()})


def unpack_head(body: bytes, rows: int, hidden_size: int) -> Tensor:
    """The inverse of `pack_head`.

    Raises:
        ValueError: The body is none, or has another shape.
    """
    head = _loaded(body).get("head")
    if head is None or head.shape != (rows, hidden_size):
        raise ValueError(f"no output layer of {rows} rows of {hidden_size}")
    return head


def _loaded(body: bytes) -> dict[str, Tensor]:
    try:
        return load(body)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"no safetensors ({error})") from error


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
    precision: TeacherPrecision
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]
    vocabulary: Vocabulary | None

    @property
    def computes(self) -> str:
        """Tells it from other weights, and from the same in another precision."""
        return f"{self.fingerprint} in {self.precision}"

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
