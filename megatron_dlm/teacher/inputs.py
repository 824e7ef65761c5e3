"""Read and check a run's teacher before a model is built: weights, tokenizer, responses."""

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_dlm.config import Config
from megatron_dlm.config.teacher_options import TeacherPrecision
from megatron_dlm.data.prompts import PromptDataset
from megatron_dlm.data.response_store import ResponseHeader, ResponseStore
from megatron_dlm.data.tokenizer import (
    HasVocabulary,
    differing_token,
    eos_token_ids,
    has_tokenizer,
    load_tokenizer,
)
from megatron_dlm.errors import bad_value
from megatron_dlm.models.architecture import Architecture, read_diffusion_kind
from megatron_dlm.models.weights import LoadableWeights, ModelWeights
from megatron_dlm.teacher.client import TeacherClient
from megatron_dlm.teacher.remote_weights import RemoteWeights
from megatron_dlm.types.diffusion_kind import DiffusionKind
from megatron_dlm.types.special_tokens import SpecialTokens


@dataclass(frozen=True)
class TeacherInputs:
    """A teacher that has weights of its own.

    Attributes:
        source: What is known of its weights.
        fingerprint: SHA-256 of the weights, read now: a checkpoint may be pruned later.
        responses: Store of its responses to the prompts; None if none are used.
        client: Reaches its servers; None where it is no server's.
        precision: That it computes in.
        weights: The same as `source`, to load; None where it is a server's.
    """

    source: ModelWeights
    fingerprint: str
    responses: ResponseStore | None = None
    client: TeacherClient | None = None
    precision: TeacherPrecision = "fp32"
    weights: LoadableWeights | None = None

    def computes(self, config: Config) -> str:
        """Tells what it says from what other weights or another precision do.

        The fingerprint alone where the precision is the student's.
        """
        usual = "bf16" if config.model.bf16 else "fp32"
        return self.fingerprint + ("" if self.precision == usual else f" in {self.precision}")


def check_diffusion_student(config: Config, student: Architecture) -> DiffusionKind:
    """Check that a model can teach itself; returns the kind of diffusion model that it is.

    Raises:
        UserError: It cannot.
    """
    load, hf_config = config.model.load, student.hf_config
    kind = read_diffusion_kind(hf_config)
    if kind is None:
        raise bad_value(
            "--load",
            load,
            f"is autoregressive; --objective {config.objective.objective} trains a diffusion model",
            "convert it first, for one with --objective opdlm",
        )
    if kind.attention_pattern == "causal":
        raise bad_value(
            "--load",
            load,
            "attends causally, so as a teacher it could not see later blocks",
            "train it under full attention first, with --objective scp",
        )
    if kind.shifted and kind.attention_pattern == "block_causal":
        raise bad_value(
            "--load", load, "states shifted logits of a block-causal model", "repair config.json"
        )
    if kind.has_causal_context:
        raise bad_value(
            "--load",
            load,
            "has a causal context, and a model that teaches itself has a block-causal one",
            "train it on with --objective opdlm, or start from a model without context_attention",
        )
    block_size = hf_config.get("block_size", config.model.block_size)
    if block_size != config.model.block_size:
        raise bad_value(
            "--block-size",
            config.model.block_size,
            f"the model in {load} has blocks of {block_size}",
            f"choose {block_size}",
        )
    return kind


def check_teacher(
    student: Architecture, teacher: ModelWeights, self_taught: DiffusionKind | None
) -> None:
    """Check that a teacher fits the student.

    Args:
        student: Architecture of the student.
        teacher: Weights of the teacher.
        self_taught: Kind of a student that teaches itself, else None.

    Raises:
        UserError: It does not fit.
    """
    if self_taught is not None:
        _check_self_teacher(student, self_taught, teacher)
    elif not teacher.is_autoregressive:
        raise bad_value(
            teacher.field,
            str(teacher.path),
            "is a diffusion model; the teacher has to be autoregressive",
            "name the autoregressive model's folder with --teacher-load",
        )
    _check_vocabulary(student, teacher)


def _check_self_teacher(student: Architecture, kind: DiffusionKind, teacher: ModelWeights) -> None:
    if teacher.diffusion_kind != kind:
        raise bad_value(
            teacher.field,
            str(teacher.path),
            f"is no diffusion model with {kind.attention_pattern} attention like the student",
            "name the weights that the student started from",
        )
    keys = ["mask_token_id"]
    if kind.attention_pattern == "block_causal":
        keys.append("block_size")
    for key in keys:
        ours, theirs = student.hf_config.get(key), teacher.architecture.hf_config.get(key)
        if None not in (ours, theirs) and ours != theirs:
            raise bad_value(
                f"{teacher.architecture.file}: {key}",
                theirs,
                f"but {student.file} says {ours}",
                "name the weights that the student started from with --teacher-load",
            )


def _check_vocabulary(student: Architecture, teacher: ModelWeights) -> None:
    if teacher.architecture.vocab_size != student.vocab_size:
        raise bad_value(
            teacher.field,
            str(teacher.path),
            f"has a vocabulary of {teacher.architecture.vocab_size}, "
            f"the student one of {student.vocab_size}",
            "choose a teacher with the student's tokenizer",
        )


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, teacher: ModelWeights
) -> None:
    """Check that the teacher's tokenizer, if its folder has one, gives the same ids as the run's.

    Raises:
        UserError: The teacher's tokenizer has other ids.
    """
    other: HasVocabulary
    if isinstance(teacher, RemoteWeights):
        if teacher.identity.vocabulary is None:
            return
        other = teacher.identity.vocabulary
    else:
        if teacher.hf_folder.resolve() == folder.resolve() or not has_tokenizer(teacher.hf_folder):
            return
        other = load_tokenizer(teacher.hf_folder, teacher.field)
    text = differing_token(tokenizer, other)
    if text is None:
        return
    ids = [vocabulary.get(text) for vocabulary in (other.get_vocab(), tokenizer.get_vocab())]
    theirs, ours = ("not at all" if token_id is None else f"as {token_id}" for token_id in ids)
    raise bad_value(
        teacher.field,
        str(teacher.path),
        f"its tokenizer knows {text!r} {theirs}, the one in {folder} {ours}",
        "choose a teacher with the student's tokenizer",
    )


def with_ends_of(
    teacher: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    special_tokens: SpecialTokens,
) -> SpecialTokens:
    """The student's special tokens with the ids that end the teacher's responses added."""
    theirs = eos_token_ids(
        tokenizer, teacher.hf_config, teacher.generation_config, str(folder), teacher.file
    )
    return replace(special_tokens, eos_token_ids=(*special_tokens.eos_token_ids, *theirs))


def response_store(
    config: Config,
    teacher: TeacherInputs,
    prompts: PromptDataset,
    special_tokens: SpecialTokens,
) -> ResponseStore:
    """The store of the teacher's responses to the prompts.

    Raises:
        UserError: The folder holds others, or a damaged file.
    """
    assert config.teacher_responses is not None
    rollout = config.rollout
    header = ResponseHeader(
        prompts=prompts.file.fingerprint,
        prompt_tokens=prompts.fingerprint(),
        num_prompts=len(prompts),
        # For a run folder: the checkpoint that it means now.
        teacher=str(teacher.source.hf_folder.resolve()),
        teacher_weights=teacher.computes(config),
        bf16=config.model.bf16,
        seed=config.data.seed,
        eos_token_ids=sorted(special_tokens.eos_token_ids),
        max_response_length=rollout.max_response_length,
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        prompt_limits=prompts.limits_fingerprint(),
    )
    store = ResponseStore(config.teacher_responses, header, "--teacher-responses", special_tokens)
    store.missing(())  # reads existing shards: a damaged file is found before any work
    return store
