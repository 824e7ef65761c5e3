"""What a teacher's server and its clients exchange: texts, targets, prompts, who the teacher is.

Bodies with targets are safetensors: tensors as they lie in memory, and nothing that runs code when
it is read.

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
RESPONSES_PATH = "/v1/responses"
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


@dataclass(frozen=True, eq=False)
class TeacherRow:
    """Texts that the teacher reads in one row, in this order: rounding depends on it.

    Attributes:
        texts: At least one.
    """

    texts: tuple[TeacherText, ...]

    def __len__(self) -> int:
        """Number of predictions."""
        return sum(map(len, self.texts))

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(len(text.token_ids) for text in self.texts)

    @property
    def digest(self) -> bytes:
        """Tells it from any other row."""
        found = hashlib.blake2b(digest_size=16)
        for text in self.texts:
            found.update(b"%d %d " % (len(text.token_ids), text.first))
            found.update(text.token_ids.numpy().tobytes())
        return found.digest()


def pack_texts(rows: Sequence[TeacherRow], k: int) -> bytes:
    """The body of a request for the k most likely tokens of each prediction; 0: hidden states."""
    texts = [text for row in rows for text in row.texts]
    return save(
        {
            "token_ids": torch.cat([text.token_ids for text in texts]).int(),
            "lengths": torch.tensor([len(text.token_ids) for text in texts]),
            "first": torch.tensor([text.first for text in texts]),
            "rows": torch.tensor([len(row.texts) for row in rows]),
            "k": torch.tensor([k]),
        }
    )


def unpack_texts(body: bytes) -> tuple[list[TeacherRow], int]:
    """The inverse of `pack_texts`.

    Raises:
        ValueError: The body is none, or its numbers contradict each other.
    """
    tensors = _loaded(body)
    kinds = {name: tensor.dtype for name, tensor in tensors.items()}
    expected = dict.fromkeys(("lengths", "first", "rows", "k"), torch.int64)
    if kinds != {**expected, "token_ids": torch.int32}:
        raise ValueError(f"tensors {kinds}")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"tensors of shapes {shapes}, in place of one dimension each")
    lengths, first, counts, k = (
        tensors[name].tolist() for name in ("lengths", "first", "rows", "k")
    )
    tokens = tensors["token_ids"].long()
    if len(lengths) != len(first) or len(k) != 1:
        raise ValueError(f"{len(lengths)} lengths, {len(first)} first tokens, {len(k)} numbers k")
    if any(not 0 <= f < length for f, length in zip(first, lengths, strict=True)):
        raise ValueError("a text is empty, or its first prediction is outside it")
    if sum(lengths) != len(tokens):
        raise ValueError(f"lengths of {sum(lengths)} tokens in all, and {len(tokens)} tokens")
    if min(counts, default=1) < 1 or sum(counts) != len(lengths):
        raise ValueError(f"rows of {sum(counts)} texts in all, and {len(lengths)} texts")
    texts = [TeacherText(t, f) for t, f in zip(tokens.split(lengths), first, strict=True)]
    ends = accumulate(counts, initial=0)
    return [TeacherRow(tuple(texts[slice(*pair)])) for pair in pairwise(ends)], k[0]


@dataclass(frozen=True)
class Drawing:
    """How responses are drawn; two of a prompt by the same drawing are equal.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: 0 is off.
        top_p: 1 is off.
        seed: Of the draws, which a prompt's `sample_index` keys too.
        eos_token_ids: Each of them ends a response.
        pad_token_id: Fills forwards.
        mask_token_id: Is never drawn.
        vocab_size: Nor are ids from here on.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    mask_token_id: int
    vocab_size: int


@dataclass(frozen=True, eq=False)
class TeacherPrompt:
    """A prompt that a teacher answers.

    Attributes:
        sample_index: Keys its draws.
        token_ids: [P] int64.
        max_response_length: Tokens of the longest response.
    """

    sample_index: int
    token_ids: Tensor
    max_response_length: int

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and longest response."""
        return len(self.token_ids) + self.max_response_length

    @property
    def digest(self) -> bytes:
        """Tells it from any other prompt."""
        numbers = b"%d %d" % (self.sample_index, self.max_response_length)
        found = hashlib.blake2b(self.token_ids.numpy().tobytes(), digest_size=16)
        found.update(numbers)
        return found.digest()


def prompts_to_json(prompts: Sequence[TeacherPrompt], drawing: Drawing) -> dict[str, Any]:
    """The JSON object of a request for responses."""
    return {
        "prompts": [{**vars(prompt), "token_ids": prompt.token_ids.tolist()} for prompt in prompts],
        "drawing": {**vars(drawing), "eos_token_ids": list(drawing.eos_token_ids)},
    }


def responses_from_json(
    value: Any, prompts: Sequence[TeacherPrompt], drawing: Drawing
) -> list[list[int]]:
    """The responses to prompts in the JSON object of an answer.

    Raises:
        ValueError: It answers none or others.
    """
    responses = value.get("responses") if isinstance(value, dict) else None
    if not isinstance(responses, list) or len(responses) != len(prompts):
        raise ValueError(f"no list `responses` of {len(prompts)} responses")
    for response, prompt in zip(responses, prompts, strict=True):
        is_list = isinstance(response, list) and all(type(token) is int for token in response)
        if not is_list or not 0 < len(response) <= prompt.max_response_length:
            limit = prompt.max_response_length
            raise ValueError(f"`responses` has one that is no list of 1 to {limit} tokens")
        special = drawing.mask_token_id
        for token in (min(response), max(response), *([special] if special in response else [])):
            if not 0 <= token < drawing.vocab_size or token == special:
                raise ValueError(f"`responses` has {token}, MASK or not in the vocabulary")
    return responses


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
