"""What a run has of its teacher: the model, or what it left on disk, or nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dlm import platform
from megatron_dlm.config import Config
from megatron_dlm.data.corpus import CorpusDataset
from megatron_dlm.data.prompts import ExampleDataset, PromptDataset, TokenTable
from megatron_dlm.data.sampler import ShuffledSampler
from megatron_dlm.data.top_k_store import TopKHeader, TopKStore, TopKTable
from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.models.model_provider import build_teacher
from megatron_dlm.parallel import errors_on_all_ranks
from megatron_dlm.teacher.base import Teacher
from megatron_dlm.teacher.frozen import FrozenTeacher
from megatron_dlm.teacher.responses import generate_missing
from megatron_dlm.teacher.self_teacher import SelfTeacher
from megatron_dlm.teacher.stored import StoredTeacher
from megatron_dlm.teacher.top_k import compute_missing
from megatron_dlm.training.trajectory_source import given_records

if TYPE_CHECKING:
    from megatron_dlm.training.inputs import RunInputs


def choose_teacher(
    config: Config, inputs: RunInputs, sampler: ShuffledSampler
) -> tuple[Teacher | None, ExampleDataset | CorpusDataset | None]:
    """Have the teacher do what it does once, and keep it only if training asks it; collective.

    Args:
        config: The run's configuration.
        inputs: With data, the teacher's source and the store of its responses.
        sampler: Maps samples to records.

    Returns:
        What says what the teacher would have predicted, None where nobody asks; and the records
        with given responses or texts, a data set's or the teacher's to the prompts that the run
        takes, None where all are the student's.

    Raises:
        UserError: A folder cannot be used.
    """
    examples = None if isinstance(inputs.data, PromptDataset) else inputs.data
    if inputs.teacher_source is None or config.traits.self_distillation:
        return None, examples

    @functools.cache
    def load() -> DiffusionGPTModel:
        assert inputs.teacher_source is not None
        model = build_teacher(inputs.teacher_source.architecture, config)
        inputs.teacher_source.load_into(model)
        return model

    if config.uses_teacher_responses:
        prompts, store = inputs.data, inputs.response_store
        assert isinstance(prompts, PromptDataset)
        assert store is not None
        vocab_size = inputs.architecture.vocab_size
        wanted = given_records(config, sampler)
        generate_missing(config, store, prompts, wanted, load, inputs.special_tokens, vocab_size)
        with errors_on_all_ranks():
            responses = store.read()
        examples = prompts.with_responses(responses, inputs.special_tokens)
        if config.distillation.teacher_top_k_cache:
            table = _stored_top_k(config, inputs, prompts, responses, examples, wanted, load)
            load.cache_clear()
            platform.release_memory()
            return StoredTeacher(table, sampler.record_index), examples
    if not config.traits.uses_teacher:
        return None, examples
    return FrozenTeacher(load(), config.training.micro_batch_size), examples


def self_teacher(config: Config, inputs: RunInputs, student: DiffusionGPTModel) -> SelfTeacher:
    """The teacher of self-distillation: a frozen copy, or the student without its adapters."""
    model = student
    if inputs.teacher_source is not None:
        model = build_teacher(inputs.teacher_source.architecture, config)
        inputs.teacher_source.load_into(model)
    return SelfTeacher(
        model,
        config,
        mask_token_id=inputs.special_tokens.mask_token_id,
        vocab_size=inputs.architecture.vocab_size,
        shifted=inputs.convention(config).shifted,
    )


def _stored_top_k(
    config: Config,
    inputs: RunInputs,
    prompts: PromptDataset,
    responses: TokenTable,
    examples: ExampleDataset,
    wanted: Sequence[int],
    load: Callable[[], DiffusionGPTModel],
) -> TopKTable:
    assert inputs.teacher_source is not None
    assert inputs.teacher_fingerprint is not None
    assert config.teacher_responses is not None
    k = config.distillation.divergence_top_k
    header = TopKHeader(
        prompt_tokens=prompts.fingerprint(),
        num_prompts=len(prompts),
        teacher=str(inputs.teacher_source.hf_folder.resolve()),
        teacher_weights=inputs.teacher_fingerprint,
        bf16=config.model.bf16,
        k=k,
    )
    folder = Path(config.teacher_responses) / f"top_{k}"
    vocab_size = inputs.architecture.vocab_size
    with errors_on_all_ranks():
        store = TopKStore(folder, header, "--teacher-responses", responses, vocab_size)
    compute_missing(config, store, examples, wanted, load, vocab_size)
    with errors_on_all_ranks():
        return store.read()
