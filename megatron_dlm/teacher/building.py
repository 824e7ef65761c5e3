"""Build the teacher of a run: a model in memory, targets on disk, or none."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_dlm import platform
from megatron_dlm.config import Config
from megatron_dlm.data.corpus import CorpusDataset
from megatron_dlm.data.prompts import ExampleDataset, PromptDataset
from megatron_dlm.data.sampler import ShuffledSampler
from megatron_dlm.data.token_table import TokenTable
from megatron_dlm.data.top_k_store import TopKHeader, TopKStore, TopKTable
from megatron_dlm.models.model import StageModel
from megatron_dlm.models.row_packing import RowPacking
from megatron_dlm.parallel import ParallelGroups, errors_on_all_ranks
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.teacher.base import Teacher
from megatron_dlm.teacher.client import TeacherClient
from megatron_dlm.teacher.frozen import frozen_teacher
from megatron_dlm.teacher.given_responses import given_records
from megatron_dlm.teacher.inputs import TeacherInputs
from megatron_dlm.teacher.loading import load_teacher
from megatron_dlm.teacher.remote import RemoteTeacher
from megatron_dlm.teacher.remote_stores import ask_for_responses, ask_for_targets
from megatron_dlm.teacher.responses import generate_missing
from megatron_dlm.teacher.self_teacher import SelfTeacher
from megatron_dlm.teacher.stored import StoredTeacher
from megatron_dlm.teacher.top_k import compute_missing
from megatron_dlm.types.diffusion_kind import DiffusionKind
from megatron_dlm.types.special_tokens import SpecialTokens


def build_teacher(
    config: Config,
    inputs: TeacherInputs | None,
    data: PromptDataset | ExampleDataset | CorpusDataset,
    sampler: ShuffledSampler,
    special_tokens: SpecialTokens,
    diffusion_kind: DiffusionKind,
    groups: ParallelGroups,
    student: Callable[[], StageModel],
    stop: StopAgreement | None = None,
    client: TeacherClient | None = None,
) -> tuple[Teacher | None, ExampleDataset | CorpusDataset | None]:
    """Complete the teacher's stored responses and targets, and build it if training needs it.

    All ranks call this.

    Args:
        config: The run's configuration.
        inputs: Weights and responses of the teacher; None if it has no weights of its own.
        data: Prompts or examples of the run.
        sampler: Maps samples to records.
        special_tokens: Of the tokenizer.
        diffusion_kind: How the student attends and predicts.
        groups: Process groups of teacher and student.
        student: Builds the student on the first call. Called here only for a student that teaches
            itself: any other teacher should have the memory to itself while it answers prompts.
        stop: Checked before every forward for a request to stop; None: never.
        client: Reaches a teacher that other processes hold; None: there is none.

    Returns:
        The teacher that annotates trajectories, None if training needs none; and the examples with
        given responses (a data set's, or the teacher's to the run's prompts), None if all
        responses are the student's rollouts.

    Raises:
        UserError: A folder of stored responses or targets cannot be used.
        StopRequested: On all ranks, while the teacher answers prompts.
    """
    examples = None if isinstance(data, PromptDataset) else data

    @functools.cache
    def load() -> StageModel:
        assert inputs is not None
        assert inputs.weights is not None, "a teacher elsewhere is not loaded"
        return load_teacher(inputs.weights, config)

    if config.traits.self_distillation:
        own = student()  # first: the order in which models are made decides random weights
        return SelfTeacher(
            own if inputs is None else load(),
            config,
            mask_token_id=special_tokens.mask_token_id,
            vocab_size=special_tokens.vocab_size,
            shifted=diffusion_kind.shifted,
            groups=groups,
            stop=stop,
        ), examples
    if inputs is None:
        return None, examples
    if config.uses_teacher_responses:
        assert isinstance(data, PromptDataset)
        assert inputs.responses is not None
        wanted = given_records(config, sampler)
        store = inputs.responses
        if client is None:
            generate_missing(config, store, data, wanted, load, special_tokens, groups, stop=stop)
        else:
            ask_for_responses(config, store, data, wanted, client, special_tokens, groups, stop)
        with errors_on_all_ranks():
            responses = inputs.responses.read()
        examples = data.with_responses(responses, special_tokens)
        if config.distillation.cache_teacher_targets:
            table = _stored_top_k(
                config,
                inputs,
                data,
                responses,
                examples,
                wanted,
                load,
                special_tokens.vocab_size,
                groups,
                stop,
                client,
            )
            load.cache_clear()
            platform.release_memory()
            return StoredTeacher(table, sampler.record_index, groups), examples
    if not config.traits.uses_teacher:
        return None, examples
    if client is not None:
        sizes, k = inputs.source.architecture, config.distillation.divergence_top_k
        if k >= sizes.vocab_size:  # the whole vocabulary
            k = 0
        packing = RowPacking.of(config)
        return RemoteTeacher(client, k, sizes, groups, stop, packing), examples
    return frozen_teacher(load(), config, stop, groups), examples


def _stored_top_k(
    config: Config,
    inputs: TeacherInputs,
    prompts: PromptDataset,
    responses: TokenTable,
    examples: ExampleDataset,
    wanted: Sequence[int],
    load: Callable[[], StageModel],
    vocab_size: int,
    groups: ParallelGroups,
    stop: StopAgreement | None,
    client: TeacherClient | None,
) -> TopKTable:
    assert config.teacher_responses is not None
    k = config.distillation.divergence_top_k
    header = TopKHeader(
        prompt_tokens=prompts.fingerprint(),
        num_prompts=len(prompts),
        teacher=str(inputs.source.hf_folder.resolve()),
        teacher_weights=inputs.computes(config),
        bf16=config.model.bf16,
        k=k,
    )
    folder = Path(config.teacher_responses) / f"top_{k}"
    with errors_on_all_ranks():
        store = TopKStore(folder, header, "--teacher-responses", responses, vocab_size)
    if client is None:
        compute_missing(config, store, examples, wanted, load, vocab_size, groups, stop=stop)
    else:
        ask_for_targets(config, store, examples, wanted, client, groups, stop)
    with errors_on_all_ranks():
        return store.read()
