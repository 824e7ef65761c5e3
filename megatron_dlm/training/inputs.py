"""What a run reads before it builds a model: checked first, so that bad input costs seconds."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from megatron_dlm.config import Config, validate_architecture, validate_length
from megatron_dlm.data.domains import Domains
from megatron_dlm.data.prompts import (
    ExampleDataset,
    PromptDataset,
    read_examples,
    read_prompts,
)
from megatron_dlm.data.response_store import ResponseHeader, ResponseStore
from megatron_dlm.data.tokenizer import (
    differing_token,
    eos_token_ids,
    has_tokenizer,
    load_tokenizer,
    resolve_special_tokens,
)
from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.rewards import REWARDS
from megatron_dlm.models.architecture import Architecture, diffusion_convention, read_architecture
from megatron_dlm.models.families import FAMILIES
from megatron_dlm.training.model_source import ModelSource, open_model_source
from megatron_dlm.types.diffusion_convention import BLOCK_DIFFUSION, DiffusionConvention
from megatron_dlm.types.special_tokens import SpecialTokens

if TYPE_CHECKING:
    from megatron_dlm.data.corpus import CorpusDataset


@dataclass(frozen=True)
class RunInputs:
    """What a run starts from.

    Attributes:
        source: The student's weights; None for random ones.
        teacher_source: The teacher's weights; None for runs without a teacher.
        architecture: The student's.
        tokenizer: Shared by student and teacher.
        tokenizer_folder: Where it was read from.
        special_tokens: EOS, padding and MASK, resolved once.
        data: Prompts that student or teacher answer, else prompt + response examples or a corpus.
        response_store: Where the teacher's responses to the prompts are; None if none are used.
        held_out: What the validation loss is measured on; None if none is.
        teacher_fingerprint: Of the teacher's weights, which may be a checkpoint that is pruned
            later; None for runs without a teacher of its own.
    """

    source: ModelSource | None
    teacher_source: ModelSource | None
    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase
    tokenizer_folder: Path
    special_tokens: SpecialTokens
    data: "PromptDataset | ExampleDataset | CorpusDataset"
    response_store: ResponseStore | None = None
    held_out: "ExampleDataset | CorpusDataset | None" = None
    teacher_fingerprint: str | None = None

    @property
    def notices(self) -> list[str]:
        """What a person has to know of the data: lines that were left out."""
        lines = []
        for data in (self.data, self.held_out):
            dropped = getattr(data, "num_dropped", 0)  # no corpus has prompts
            if data is not None and dropped:
                lines.append(
                    f"{data.file.path}: {dropped} of {dropped + len(data)} prompts dropped, "
                    "longer than --max-prompt-length"
                )
        return lines

    @property
    def starts_autoregressive(self) -> bool:
        """Whether the weights that the run starts from are an autoregressive model's."""
        return self.source is not None and self.source.is_autoregressive

    def convention(self, config: Config) -> DiffusionConvention:
        """How the student decodes: as its objective trains it, else as its config.json says."""
        stated = diffusion_convention(self.architecture.hf_config)
        return config.convention or stated or BLOCK_DIFFUSION

    def hf_config(self, config: Config) -> dict[str, Any]:
        """config.json of the trained model: a diffusion model names its convention and its MASK."""
        hf_config = dict(self.architecture.hf_config)
        for key in ("attention_pattern", "shifted", "block_size"):
            hf_config.pop(key, None)
        if config.convention is None and not config.traits.self_distillation:
            family = FAMILIES[self.architecture.family]
            kind = family.autoregressive_type(is_moe=self.architecture.is_moe)
            hf_config["model_type"] = kind.name
            return hf_config
        convention = self.convention(config)
        hf_config |= {
            "attention_pattern": convention.attention_pattern,
            "shifted": convention.shifted,
            "mask_token_id": self.special_tokens.mask_token_id,
        }
        # A model of full attention is decoded as a whole unless its rollouts went by blocks.
        if convention.attention_pattern == "block_causal" or config.uses_rollouts:
            hf_config["block_size"] = config.model.block_size
        return hf_config


def resumes(config: Config, source: ModelSource | None) -> bool:
    """Whether `--load` is a run that goes on, rather than weights for a new one."""
    if source is None or not source.is_megatron or config.model.finetune:
        return False
    from megatron_dlm.training.checkpointing import has_training_state  # loads PyTorch

    return has_training_state(source.path)


def _check_mask_embedding(config: Config, source: ModelSource | None) -> None:
    """Only a conversion gives MASK a row; one that is resumed has given it already."""
    init = config.model.mask_embedding_init
    converts = source is not None and source.is_autoregressive
    if init is None or converts or resumes(config, source):
        return
    start = "random weights are" if source is None else f"the model in {source.path} is"
    raise bad_value(
        "--mask-embedding-init",
        init,
        f"{start} no autoregressive model to convert",
        "drop --mask-embedding-init",
    )


def _check_diffusion_student(config: Config, student: Architecture) -> DiffusionConvention:
    """What a model that teaches itself has to be; returns its convention."""
    load, hf_config = config.model.load, student.hf_config
    convention = diffusion_convention(hf_config)
    if convention is None:
        raise bad_value(
            "--load",
            load,
            f"is autoregressive; --objective {config.objective.objective} trains a diffusion model",
            "convert it first, for one with --objective opdlm",
        )
    if convention.attention_pattern == "causal":
        raise bad_value(
            "--load",
            load,
            "attends causally; a view of what it wrote later needs more",
            "train it under full attention first, with --objective scp",
        )
    if convention.shifted and convention.attention_pattern == "block_causal":
        raise bad_value(
            "--load", load, "states shifted logits of a block-causal model", "repair config.json"
        )
    block_size = hf_config.get("block_size", config.model.block_size)
    if block_size != config.model.block_size:
        raise bad_value(
            "--block-size",
            config.model.block_size,
            f"the model in {load} has blocks of {block_size}",
            f"choose {block_size}",
        )
    return convention


def _check_self_teacher(
    student: Architecture, convention: DiffusionConvention, teacher: ModelSource
) -> None:
    if teacher.convention != convention:
        raise bad_value(
            teacher.field,
            str(teacher.path),
            f"is no diffusion model with {convention.attention_pattern} attention like the student",
            "name the weights that the student started from",
        )
    keys = ["mask_token_id"]
    if convention.attention_pattern == "block_causal":
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
    _check_vocabulary(student, teacher)


def _check_teacher(student: Architecture, teacher: ModelSource) -> None:
    if not teacher.is_autoregressive:
        raise bad_value(
            teacher.field,
            str(teacher.path),
            "is a diffusion model; the teacher has to be autoregressive",
            "name the autoregressive model's folder with --teacher-load",
        )
    _check_vocabulary(student, teacher)


def _check_vocabulary(student: Architecture, teacher: ModelSource) -> None:
    if teacher.architecture.vocab_size != student.vocab_size:
        raise bad_value(
            teacher.field,
            str(teacher.path),
            f"has a vocabulary of {teacher.architecture.vocab_size}, "
            f"the student one of {student.vocab_size}",
            "choose a teacher with the student's tokenizer",
        )


def _check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, teacher: ModelSource
) -> None:
    """The teacher reads the ids that the run's tokenizer writes; its folder may hold none."""
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


def _with_ends_of(
    teacher: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    special_tokens: SpecialTokens,
) -> SpecialTokens:
    """What ends the teacher's responses ends those of the student, which learns to write them."""
    theirs = eos_token_ids(
        tokenizer, teacher.hf_config, teacher.generation_config, str(folder), teacher.file
    )
    return replace(special_tokens, eos_token_ids=(*special_tokens.eos_token_ids, *theirs))


def _response_store(
    config: Config,
    teacher: ModelSource,
    teacher_fingerprint: str,
    prompts: PromptDataset,
    special_tokens: SpecialTokens,
) -> ResponseStore:
    assert config.teacher_responses is not None
    rollout = config.rollout
    header = ResponseHeader(
        prompts=prompts.file.fingerprint,
        prompt_tokens=prompts.fingerprint(),
        num_prompts=len(prompts),
        # Of a run folder, the checkpoint it stands for now.
        teacher=str(teacher.hf_folder.resolve()),
        teacher_weights=teacher_fingerprint,
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
    store.missing(())  # reads what is there: a damaged file is found before any work
    return store


def _given_responses(
    config: Config,
    option: str,
    tokenizer: PreTrainedTokenizerBase,
    special_tokens: SpecialTokens,
    architecture: Architecture,
    *,
    shuffle: bool,
) -> "ExampleDataset | CorpusDataset":
    """The data that an option names: examples, or windows of a corpus."""
    path, field = getattr(config.data, option), "--" + option.replace("_", "-")
    if config.response_source == "corpus":
        from megatron_dlm.data.corpus import CorpusDataset  # loads PyTorch and Megatron-Core

        return CorpusDataset(
            path,
            config.data.seq_length,
            seed=config.data.seed,
            shuffle=shuffle,
            special_tokens=special_tokens,
            field=field,
        )
    return read_examples(
        path,
        tokenizer,
        special_tokens,
        config.data.max_prompt_length,
        config.rollout.max_response_length,
        config.data.chat_template_kwargs,
        field,
        architecture.max_position_embeddings,
        config.data.train_on,
        domains=Domains.from_config(config),
        long_prompts=config.data.long_prompts,
    )


def _check_held_out(config: Config, held_out: "ExampleDataset | CorpusDataset") -> None:
    wanted = config.training.eval_iters * config.training.global_batch_size
    if wanted > len(held_out):
        field = "--" + str(config.validation_option).replace("_", "-")
        batch = config.training.global_batch_size
        raise bad_value(
            field,
            held_out.file.path,
            f"has {len(held_out)} samples, --eval-iters {config.training.eval_iters} of "
            f"--global-batch-size {batch} need {wanted}",
            f"choose --eval-iters {len(held_out) // batch} or less"
            if len(held_out) >= batch
            else "hold out more",
        )
    if config.response_source == "corpus":
        # Else found at the first validation, which may come after the last update.
        for index in range(wanted):
            held_out.sample(index, index)


def read_inputs(config: Config) -> RunInputs:
    """Read and check checkpoints' descriptions, tokenizer and data; loads no weights.

    Raises:
        UserError: Anything that could not work.
    """
    source = teacher_source = teacher_fingerprint = None
    if config.model.load is not None:
        source = open_model_source(config.model.load, "--load", config.model.verify_checkpoint)
        architecture = source.architecture
    elif config.model.model_config is not None:
        architecture = read_architecture(config.model.model_config, "--model-config")
    else:
        raise bad_value(
            "--load", None, "nothing to train", "name a model folder, or give --model-config"
        )
    _check_mask_embedding(config, source)
    convention = None
    if config.traits.self_distillation:
        convention = _check_diffusion_student(config, architecture)
    if config.needs_teacher:
        path = config.distillation.teacher_load or config.model.load
        assert path is not None
        field = "--teacher-load" if config.distillation.teacher_load else "--load"
        teacher_source = open_model_source(path, field, config.model.verify_checkpoint)
        if convention is None:
            _check_teacher(architecture, teacher_source)
        else:
            _check_self_teacher(architecture, convention, teacher_source)
    teacher = None if teacher_source is None else teacher_source.architecture
    validate_architecture(config, architecture, teacher)
    if config.model.tokenizer is not None:
        tokenizer_folder = Path(config.model.tokenizer)
    elif source is not None:
        tokenizer_folder = source.hf_folder
    else:
        raise bad_value("--tokenizer", None, "no tokenizer to read", "name its folder")
    tokenizer = load_tokenizer(tokenizer_folder)
    special_tokens = resolve_special_tokens(
        tokenizer,
        architecture.hf_config,
        str(tokenizer_folder),
        generation_config=architecture.generation_config,
        config_file=architecture.file,
    )
    if teacher_source is not None:
        _check_tokenizer(tokenizer, tokenizer_folder, teacher_source)
        special_tokens = _with_ends_of(
            teacher_source.architecture, tokenizer, tokenizer_folder, special_tokens
        )
        teacher_fingerprint = teacher_source.fingerprint()
    architecture = architecture.ending_at(special_tokens.eos_token_ids)
    data: PromptDataset | ExampleDataset | CorpusDataset
    response_store = held_out = None
    if config.response_source in ("data", "corpus"):
        data = _given_responses(
            config,
            config.data_option,
            tokenizer,
            special_tokens,
            architecture,
            shuffle=config.data.shuffle,
        )
        if config.validation_path is not None:
            assert config.validation_option is not None
            held_out = _given_responses(
                config,
                config.validation_option,
                tokenizer,
                special_tokens,
                architecture,
                shuffle=True,  # documents of one kind often lie together: take some of all
            )
            _check_held_out(config, held_out)
    else:
        assert config.data.prompts is not None
        data = read_prompts(
            config.data.prompts,
            tokenizer,
            special_tokens,
            config.data.max_prompt_length,
            config.data.chat_template_kwargs,
            domains=Domains.from_config(config),
            long_prompts=config.data.long_prompts,
        )
        if config.traits.verifies:
            REWARDS[config.objective.reward].check(data)
        if config.uses_teacher_responses:
            assert teacher_source is not None
            assert teacher_fingerprint is not None
            response_store = _response_store(
                config, teacher_source, teacher_fingerprint, data, special_tokens
            )
    validate_length(config.of_data(len(data)))
    return RunInputs(
        source,
        teacher_source,
        architecture,
        tokenizer,
        tokenizer_folder,
        special_tokens,
        data,
        response_store,
        held_out,
        teacher_fingerprint,
    )
