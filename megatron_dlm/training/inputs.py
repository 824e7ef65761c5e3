"""What a run reads before it builds a model: checked first, so that bad input costs seconds."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from megatron_dlm.config import Config, validate_architecture, validate_length
from megatron_dlm.config.fields import flag_of, value_of
from megatron_dlm.data.chat_template import unread_variables
from megatron_dlm.data.domains import Domains
from megatron_dlm.data.open_records import open_records
from megatron_dlm.data.prompts import ExampleDataset, PromptDataset
from megatron_dlm.data.record_source import RecordSource
from megatron_dlm.data.token_shards import (
    ALONE,
    Ranks,
    TokenFiles,
    read_shared_examples,
    read_shared_prompts,
)
from megatron_dlm.data.tokenizer import load_tokenizer, special_tokens_of
from megatron_dlm.data.tokenizing import ExampleReader, PromptReader
from megatron_dlm.entry import warn
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.evaluation.rewards import reward_of
from megatron_dlm.models.architecture import Architecture, read_architecture, read_diffusion_kind
from megatron_dlm.models.families import FAMILIES
from megatron_dlm.stop_request import StopRequest
from megatron_dlm.teacher.client import TeacherClient
from megatron_dlm.teacher.inputs import (
    TeacherInputs,
    check_diffusion_student,
    check_teacher,
    check_tokenizer,
    response_store,
    with_ends_of,
)
from megatron_dlm.teacher.remote_weights import RemoteWeights, remote_weights, url_client
from megatron_dlm.training.evaluation_inputs import EvaluationInputs, read_evaluation_inputs
from megatron_dlm.training.model_source import ModelSource, open_model_source
from megatron_dlm.training.run_folder import is_of_run
from megatron_dlm.types.diffusion_kind import BLOCK_DIFFUSION, DiffusionKind
from megatron_dlm.types.special_tokens import SpecialTokens

if TYPE_CHECKING:
    from megatron_dlm.data.corpus import CorpusDataset
    from megatron_dlm.training.resume import Difference, Resumption

DATA_CACHE = "data_cache"
"""Folder of tokenised records in that of a run of several processes."""


@dataclass(frozen=True)
class RunInputs:
    """What a run starts from.

    Attributes:
        source: The student's weights, of a run that goes on those of its checkpoint; None for
            random ones.
        teacher: None for runs without a teacher of its own weights.
        architecture: The student's.
        diffusion_kind: How the student decodes: as its objective trains it, else as its config.json
            says.
        tokenizer: Shared by student and teacher.
        tokenizer_folder: Where it was read from.
        special_tokens: EOS, padding and MASK, resolved once.
        data: Prompts that student or teacher answer, else prompt + response examples or a corpus.
        held_out: What the validation loss is measured on; None if none is.
        evaluation: Held-out prompts that the student answers; None if there are none.
        resumed: What a run that goes on is loaded from; None for a new one.
        changes: What is not as it was when that run was started.
        load_fingerprint: Of the weights in `--load`, from which the run was started; None if it was
            started from random ones, or they are not there any more.
    """

    source: ModelSource | None
    teacher: TeacherInputs | None
    architecture: Architecture
    diffusion_kind: DiffusionKind
    tokenizer: PreTrainedTokenizerBase
    tokenizer_folder: Path
    special_tokens: SpecialTokens
    data: "PromptDataset | ExampleDataset | CorpusDataset"
    held_out: "ExampleDataset | CorpusDataset | None" = None
    evaluation: EvaluationInputs | None = None
    resumed: "Resumption | None" = None
    changes: "tuple[Difference, ...]" = ()
    load_fingerprint: str | None = None

    def notices(self, config: Config) -> list[str]:
        """What a person has to know: what a resumed run changes, and what is left out."""
        lines = [f"changed: {difference}" for difference in self.changes]
        lines += unread_variables(self.tokenizer, config.template.chat_template_kwargs)
        evaluated = None if self.evaluation is None else self.evaluation.prompts
        for data in (self.data, self.held_out, evaluated):
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

    def hf_config(self, config: Config) -> dict[str, Any]:
        """config.json of the trained model: a diffusion model names its kind and its MASK."""
        hf_config = dict(self.architecture.hf_config)
        for key in ("attention_pattern", "shifted", "context_attention", "block_size"):
            hf_config.pop(key, None)
        if config.diffusion_kind is None and not config.traits.self_distillation:
            family = FAMILIES[self.architecture.family]
            model_type = family.autoregressive_type(is_moe=self.architecture.is_moe)
            hf_config["model_type"] = model_type.name
            return hf_config
        kind = self.diffusion_kind
        hf_config |= {
            "attention_pattern": kind.attention_pattern,
            "shifted": kind.shifted,
            "mask_token_id": self.special_tokens.mask_token_id,
        }
        if read_diffusion_kind(hf_config) != kind:  # the model type implies the other context
            hf_config["context_attention"] = kind.context_attention
        # A model of full attention is decoded as a whole unless its rollouts went by blocks.
        if kind.attention_pattern == "block_causal" or config.uses_rollouts:
            hf_config["block_size"] = config.model.block_size
        return hf_config


def _original_weights(config: Config) -> ModelSource | None:
    """The weights that a run was started from, which it can go on without; None without them."""
    load, save = config.model.load, config.logging.save
    if load is None or (save is not None and is_of_run(load, save)):
        return None
    try:
        return open_model_source(load, "--load", config.model.verify_checkpoint)
    except UserError as error:
        warn(f"what the run was started from is not there any more: {error}")
        return None


def _check_mask_embedding(config: Config, source: ModelSource | None) -> None:
    """Only a conversion gives MASK a row."""
    init = config.model.mask_embedding_init
    converts = source is not None and source.is_autoregressive
    if init is None or converts:
        return
    start = "random weights are" if source is None else f"the model in {source.path} is"
    raise bad_value(
        "--mask-embedding-init",
        init,
        f"{start} no autoregressive model to convert",
        "drop --mask-embedding-init",
    )


def _corpus(
    config: Config, option: str, special_tokens: SpecialTokens, *, shuffle: bool
) -> "CorpusDataset":
    """Windows of the corpus that an option names."""
    from megatron_dlm.data.corpus import CorpusDataset  # loads PyTorch and Megatron-Core

    return CorpusDataset(
        value_of(config, option),
        config.data.seq_length,
        seed=config.data.seed,
        shuffle=shuffle,
        special_tokens=special_tokens,
        field=flag_of(option),
    )


def _check_held_out(config: Config, held_out: "ExampleDataset | CorpusDataset") -> None:
    wanted = config.held_out.eval_iters * config.training.global_batch_size
    if wanted > len(held_out):
        field = flag_of(str(config.validation_option))
        batch = config.training.global_batch_size
        raise bad_value(
            field,
            held_out.file.path,
            f"has {len(held_out)} samples, --eval-iters {config.held_out.eval_iters} of "
            f"--global-batch-size {batch} need {wanted}",
            f"choose --eval-iters {len(held_out) // batch} or less"
            if len(held_out) >= batch
            else "hold out more",
        )
    if config.response_source == "corpus":
        # Else found at the first validation, which may come after the last update.
        for index in range(wanted):
            held_out.sample(index, index)


@dataclass(frozen=True)
class _Student:
    """What a run reads first; names are those of `_Models`."""

    source: ModelSource | None
    original: ModelSource | None
    architecture: Architecture
    self_taught: DiffusionKind | None


@dataclass(frozen=True)
class _Models:
    """What a run reads before its data, by the names that it has in `RunInputs`."""

    source: ModelSource | None
    original: ModelSource | None
    teacher: TeacherInputs | None
    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase
    tokenizer_folder: Path
    special_tokens: SpecialTokens


def _read_student(config: Config, resumed: "Resumption | None") -> _Student:
    """What the student starts from."""
    source = original = None
    if resumed is not None:
        verify = config.model.verify_checkpoint
        source = open_model_source(str(resumed.checkpoint), resumed.field, verify)
        architecture = source.architecture
        original = _original_weights(config)
    elif config.model.load is not None:
        source = open_model_source(config.model.load, "--load", config.model.verify_checkpoint)
        architecture = source.architecture
        original = source
    elif config.model.model_config is not None:
        architecture = read_architecture(config.model.model_config, "--model-config")
    else:
        raise bad_value(
            "--load", None, "nothing to train", "name a model folder, or give --model-config"
        )
    if resumed is None:
        _check_mask_embedding(config, source)
    self_taught = None
    if config.traits.self_distillation:
        self_taught = check_diffusion_student(config, architecture)
    return _Student(source, original, architecture, self_taught)


def _read_models(
    config: Config, student: _Student, client: TeacherClient | None, remote: RemoteWeights | None
) -> _Models:
    """Descriptions of the models, and the tokenizer.

    Args:
        config: Of the run.
        student: Read before.
        client: Reaches the servers in `--teacher-url`; None without any.
        remote: What they hold.
    """
    source, original = student.source, student.original
    architecture, self_taught = student.architecture, student.self_taught
    teacher = None
    weights: ModelSource | RemoteWeights | None = remote
    if remote is not None:
        check_teacher(architecture, remote, self_taught)
    elif config.needs_teacher:
        path = config.distillation.teacher_load or config.model.load
        assert path is not None
        field = "--teacher-load" if config.distillation.teacher_load else "--load"
        weights = open_model_source(path, field, config.model.verify_checkpoint)
        check_teacher(architecture, weights, self_taught)
    validate_architecture(config, architecture, None if weights is None else weights.architecture)
    if config.model.tokenizer is not None:
        tokenizer_folder = Path(config.model.tokenizer)
    elif source is not None:
        # Checkpoints of the run may be pruned while it goes on.
        tokenizer_folder = (original or source).hf_folder
    else:
        raise bad_value("--tokenizer", None, "no tokenizer to read", "name its folder")
    tokenizer = load_tokenizer(tokenizer_folder)
    special_tokens = special_tokens_of(tokenizer, architecture, tokenizer_folder)
    if weights is not None:
        check_tokenizer(tokenizer, tokenizer_folder, weights)
        special_tokens = with_ends_of(
            weights.architecture, tokenizer, tokenizer_folder, special_tokens
        )
        precision, here = config.teacher_precision, None
        if isinstance(weights, RemoteWeights):
            precision = weights.identity.precision
        else:
            here = weights
        teacher = TeacherInputs(
            weights, weights.fingerprint(), client=client, precision=precision, weights=here
        )
    architecture = architecture.ending_at(special_tokens.eos_token_ids)
    return _Models(
        source, original, teacher, architecture, tokenizer, tokenizer_folder, special_tokens
    )


_Records = dict[str, "RecordSource | CorpusDataset"]
"""What a run is given, opened, by the option that names it."""


def _open_data(config: Config, models: _Models) -> _Records:
    """The data and what is held out of it: records that have to be tokenised, or corpora."""
    options = [config.data_option]
    if config.validation_option is not None:
        options.append(config.validation_option)
    if config.response_source == "corpus":
        # Held-out documents of one kind often lie together: take some of all.
        return {
            option: _corpus(
                config,
                option,
                models.special_tokens,
                shuffle=config.data.shuffle or option != config.data_option,
            )
            for option in options
        }
    domain = config.template.domain_field
    return {
        option: open_records(str(value_of(config, option)), flag_of(option), domain)
        for option in options
    }


def _read_data(
    config: Config, models: _Models, records: _Records, files: TokenFiles | None
) -> "dict[str, PromptDataset | ExampleDataset | CorpusDataset]":
    """Tokenise records; collective over the processes of `files`."""
    settings = (
        models.tokenizer,
        models.special_tokens,
        config.data.max_prompt_length,
        config.template.chat_template_kwargs,
        Domains.from_config(config),
        config.data.long_prompts,
    )
    read: dict[str, PromptDataset | ExampleDataset | CorpusDataset] = {}
    for option, data in records.items():
        if not isinstance(data, RecordSource):
            read[option] = data
        elif config.response_source == "data":
            reader = ExampleReader(
                *settings,
                config.rollout.max_response_length,
                models.architecture.max_position_embeddings,
                config.data.train_on,
            )
            read[option] = read_shared_examples(data, reader, files)
        else:
            read[option] = read_shared_prompts(data, PromptReader(*settings), files)
    return read


def _token_files(config: Config, models: _Models, ranks: Ranks) -> TokenFiles | None:
    """Where tokenised records are kept; None where that is nowhere, or nothing is to be written.

    Several processes share them in any case, so that one of them tokenises a record.
    """
    folder, field, save = config.data.data_cache_path, "--data-cache-path", config.logging.save
    if folder is None and save is not None and ranks.size > 1:
        folder, field = str(Path(save) / DATA_CACHE), "--save"
    if folder is None or config.dry_run:
        return None
    return TokenFiles(Path(folder), field, models.tokenizer_folder, ranks)


def joined_ranks() -> Ranks:
    """All processes, which have joined (`parallel.joined`)."""
    import torch

    from megatron_dlm.parallel import (  # loads Megatron-Core
        errors_on_all_ranks,
        from_rank_zero,
        highest_of_ranks,
    )

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return Ranks(rank, size, errors_on_all_ranks, from_rank_zero, highest_of_ranks)


def read_inputs(
    config: Config,
    resumed: "Resumption | None" = None,
    ranks: Ranks = ALONE,
    request: StopRequest | None = None,
) -> RunInputs:
    """Read and check checkpoints' descriptions, tokenizer and data; loads no weights.

    Collective over the processes that read together.

    Args:
        config: Of the run.
        resumed: What it goes on from (`run_start.decide_start`); None for a new run.
        ranks: Who reads together.
        request: The wish of this process to stop, looked at while servers are waited for.

    Raises:
        UserError: Anything that could not work, or a run that goes on was started with something
            else; on all of them.
        StopRequested: One of them was asked to stop before servers have answered; on all of them.
    """
    client = remote = None
    with ranks.errors_on_all():
        student = _read_student(config, resumed)
        if config.teacher.teacher_url:
            client = url_client(config)
    if client is not None:
        remote = remote_weights(config, client, ranks, request)
    with ranks.errors_on_all():
        models = _read_models(config, student, client, remote)
        records = _open_data(config, models)
    files = _token_files(config, models, ranks)
    with ranks.errors_on_all() if files is None else nullcontext():
        read = _read_data(config, models, records, files)
    with ranks.errors_on_all():
        return _checked(config, models, read, resumed)


def _checked(
    config: Config,
    models: _Models,
    read: "dict[str, PromptDataset | ExampleDataset | CorpusDataset]",
    resumed: "Resumption | None",
) -> RunInputs:
    """What was read, put together and compared."""
    data, teacher = read[config.data_option], models.teacher
    held_out = read.get(str(config.validation_option))
    if held_out is not None:
        assert not isinstance(held_out, PromptDataset)
        _check_held_out(config, held_out)
    if isinstance(data, PromptDataset):
        if config.traits.verifies:
            reward_of(config).check(data)
        if config.uses_teacher_responses:
            assert teacher is not None
            store = response_store(config, teacher, data, models.special_tokens)
            teacher = replace(teacher, responses=store)
    validate_length(config.of_data(len(data)))
    hf_config = models.architecture.hf_config
    kind = config.diffusion_kind or read_diffusion_kind(hf_config) or BLOCK_DIFFUSION
    if config.shares_tokens_in_rollouts and kind.attention_pattern == "full":
        problem = "shares out a KV cache, and decoding under full attention has none"
        raise bad_value("--rollout-context-parallel", "tokens", problem, "choose sequences")
    evaluation = None
    if config.evaluates:
        evaluation = read_evaluation_inputs(
            config, models.tokenizer, models.special_tokens, models.architecture, kind
        )
    inputs = RunInputs(
        models.source,
        teacher,
        models.architecture,
        kind,
        models.tokenizer,
        models.tokenizer_folder,
        models.special_tokens,
        data,
        held_out,
        evaluation,
        resumed,
        load_fingerprint=None if models.original is None else models.original.fingerprint(),
    )
    if resumed is None:
        return inputs
    from megatron_dlm.training.resume import check_resumable  # loads PyTorch

    changes = check_resumable(config.of_data(len(data)), inputs, resumed)
    return replace(inputs, changes=tuple(changes))
