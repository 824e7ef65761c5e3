"""A training run, put together: student, teacher, objective, trajectories, progress."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dlm import platform
from megatron_dlm.activity import ACTIVITY, SAVE
from megatron_dlm.config import Config
from megatron_dlm.config.fields import flag_of, value_of
from megatron_dlm.data.corpus import CorpusDataset
from megatron_dlm.data.prompts import ExampleDataset, PromptDataset
from megatron_dlm.data.sampler import ShuffledSampler
from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.rewards import reward_of
from megatron_dlm.models.lora import drop_out_adapter_inputs, train_adapters_only
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.objectives import OBJECTIVES
from megatron_dlm.objectives.base import Objective
from megatron_dlm.parallel import ParallelGroups, on_rank_zero
from megatron_dlm.rollout.curriculum import response_length
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.trajectory_engine import AheadEngine, TrajectoryEngine
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.stop_request import StopRequest
from megatron_dlm.teacher.base import Teacher
from megatron_dlm.teacher.building import build_teacher
from megatron_dlm.teacher.client import TeacherClient
from megatron_dlm.teacher.remote import RemoteTeacher
from megatron_dlm.training.best_checkpoint import HeldOutFigure
from megatron_dlm.training.checkpoint_saving import CheckpointSaver
from megatron_dlm.training.checkpointing import (
    Progress,
    attach_adapters_of_run,
    load_training_state,
)
from megatron_dlm.training.held_out_evaluation import HeldOutEvaluation
from megatron_dlm.training.inputs import RunInputs
from megatron_dlm.training.mask_embedding import initialize_mask_embedding
from megatron_dlm.training.offload import PhaseOffload, build_offload
from megatron_dlm.training.resume import resumable_config
from megatron_dlm.training.run_folder import HF_FOLDER, find_checkpoint, is_run_folder
from megatron_dlm.training.stored_batch import StoredTrajectories, restored, stored
from megatron_dlm.training.student import Student, build_student
from megatron_dlm.training.trajectory_source import TrajectorySource
from megatron_dlm.training.validation import Validation
from megatron_dlm.training.verified_rollout import Verifier
from megatron_dlm.types.trajectory import Prompt, Trajectory


@dataclass
class Run:
    """One rank's part of a training run.

    `saver` is None without a run folder. `figure` is what the student as it is now reaches on
    held-out data, the accuracy where prompts are held out, None where that was not measured; a
    checkpoint is saved with it, and the one with the best can be kept. `leftovers` is what the last
    rollout has left for the next one.
    """

    config: Config
    inputs: RunInputs
    student: Student
    teacher: Teacher | None
    objective: Objective
    source: TrajectorySource
    sampler: ShuffledSampler
    progress: Progress
    offload: PhaseOffload
    groups: ParallelGroups
    stop: StopAgreement
    validation: Validation | None = None
    evaluation: HeldOutEvaluation | None = None
    stored_batch: Sequence[dict[str, Any]] = ()
    leftovers: Sequence[Trajectory] = ()
    saver: CheckpointSaver | None = None
    figure: HeldOutFigure | None = None
    is_saved: bool = True

    def save(self, batch: Sequence[Trajectory] | None = None, *, stops: bool = False) -> None:
        """Start a checkpoint of the current progress in the run folder; see `saver.finish`.

        Args:
            batch: This rank's own trajectories of the rollout batch in work; None between two, and
                where the data give them again.
            stops: Whether the run ends then: a rollout that servers decode ahead is not waited for.
        """
        folder = self.config.logging.save
        self.is_saved = True
        if folder is None or self.saver is None:
            return
        engine = self.source.engine
        ahead = engine.ahead(waits=not stops) if isinstance(engine, AheadEngine) else []
        with ACTIVITY.during(SAVE):
            self.saver.finish()  # this may remove the checkpoint that holds the tokenizer
            self.saver.save(
                self.student.model,
                hf_config=self.inputs.hf_config(self.config),
                generation_config=self.inputs.architecture.generation_config,
                tokenizer_folder=self._tokenizer_folder(folder),
                progress=self.progress,
                student=self.student,
                run_config=resumable_config(self.config, self.inputs),
                figure=self.figure,
                trajectories=StoredTrajectories(
                    self._gathered(self.groups.part_of_shared(batch or ())),
                    [stored(t) for t in self.leftovers],
                    self._gathered(ahead),
                ),
            )

    def prompt_of(self, sample: int) -> Prompt:
        """The prompt of a sample of a run with rollouts."""
        return _prompt_of(sample, self.inputs, self.sampler)

    def finish_saving(self) -> None:
        """Wait until the checkpoint that is being written is published; all ranks call this."""
        if self.saver is not None:
            self.saver.finish()

    def _gathered(self, own: Sequence[Trajectory]) -> list[dict[str, Any]]:
        """The stored trajectories of all replicas, on rank 0."""
        own = own if self.groups.is_first_of_replica else []
        return on_rank_zero([stored(trajectory) for trajectory in own])

    def _tokenizer_folder(self, run_folder: str) -> Path:
        """Where the tokenizer lies: if it was that of a checkpoint, this may have been pruned."""
        folder = self.inputs.tokenizer_folder
        if folder.is_dir() or not is_run_folder(run_folder):
            return folder
        return find_checkpoint(run_folder, "--save") / HF_FOLDER


def _prompt_of(sample: int, inputs: RunInputs, sampler: ShuffledSampler) -> Prompt:
    prompt = inputs.data.sample(sampler.record_index(sample), sample)
    assert isinstance(prompt, Prompt)
    return prompt


def build_run(
    config: Config,
    inputs: RunInputs,
    stop: StopAgreement | None = None,
    teacher_client: TeacherClient | None = None,
) -> Run:
    """Build models, load weights, and go on from where the run was, if it was.

    Process groups must exist (`parallel`).

    Args:
        config: Of the run.
        inputs: What it reads.
        stop: Agrees with the other ranks on an early end; None: nobody asks for one.
        teacher_client: Reaches the teacher of `--teacher-ranks`; None without these.

    Raises:
        UserError: A checkpoint does not fit.
        StopRequested: On all ranks, while the teacher answers prompts; what it has stored stays.
    """
    config = config.of_data(len(inputs.data))
    parallel = config.parallel
    split = max(parallel.expert_model_parallel_size, parallel.pipeline_model_parallel_size)
    if inputs.source is None and split > 1 and not platform.is_cuda():
        raise bad_value(
            "--model-config",
            config.model.model_config,
            "random weights on a CPU would repeat themselves over expert and pipeline ranks",
            "start with both sizes 1, and load that checkpoint at any layout",
        )
    sampler = ShuffledSampler(len(inputs.data), config.data.seed, config.data.shuffle)

    groups = ParallelGroups.from_parallel_state()
    stop = stop or StopAgreement(StopRequest(), groups)
    _check_same_data(config, inputs)

    @functools.cache
    def student_and_progress() -> _Started:
        return _build_student(config, inputs, groups)

    teacher, examples = build_teacher(
        config,
        inputs.teacher,
        inputs.data,
        sampler,
        inputs.special_tokens,
        inputs.diffusion_kind,
        groups,
        student=lambda: student_and_progress()[0].model,
        stop=stop,
        client=teacher_client
        if inputs.teacher is None
        else inputs.teacher.client or teacher_client,
    )
    student, progress, trajectories = student_and_progress()
    begun = progress.consumed_samples + len(trajectories.leftovers)
    if trajectories.leftovers and begun > config.num_samples:
        raise bad_value(
            flag_of(config.length_option),
            value_of(config, config.length_option),
            f"that is {config.num_samples} samples, and the run has begun {begun}",
            f"choose a length of {begun} samples or more",
        )
    objective = OBJECTIVES[config.objective.objective](
        config,
        inputs.special_tokens.mask_token_id,
        inputs.architecture.vocab_size,
        inputs.diffusion_kind,
    )
    source = _build_source(config, inputs, student, teacher, examples, groups, stop, progress)
    if isinstance(source.engine, AheadEngine) and config.engine.max_rollout_staleness:
        ahead = [
            restored(entry, _prompt_of(entry["sample_index"], inputs, sampler))
            for entry in trajectories.ahead
        ]
        if ahead:
            rollout = progress.rollout + bool(trajectories.batch)
            source.engine.take_up(ahead, response_length(config, rollout))
    return Run(
        config,
        inputs,
        student,
        teacher,
        objective,
        source,
        sampler,
        progress,
        build_offload(config, student, teacher),
        groups,
        stop,
        None if inputs.held_out is None else Validation(config, objective, inputs.held_out, groups),
        None
        if inputs.evaluation is None
        else HeldOutEvaluation(
            config, inputs.evaluation, inputs.tokenizer, inputs.special_tokens, groups, stop
        ),
        trajectories.batch,
        [
            restored(entry, _prompt_of(entry["sample_index"], inputs, sampler))
            for entry in trajectories.leftovers
        ],
        _build_saver(config),
    )


def _check_same_data(config: Config, inputs: RunInputs) -> None:
    """Replicas decode each other's prompts, by their numbers; all ranks call this.

    Raises:
        UserError: On all ranks, if some of them read other data than rank 0.
    """
    ranks = torch.distributed.get_world_size()
    read: list[tuple[str, int] | None] = [None] * ranks
    own = inputs.data.file.fingerprint, len(inputs.data)
    torch.distributed.all_gather_object(read, own)
    others = [rank for rank in range(ranks) if read[rank] != read[0]]
    if others:
        raise bad_value(
            flag_of(config.data_option),
            value_of(config, config.data_option),
            f"rank {others[0]} reads other records there than rank 0 ({len(others)} ranks do)",
            "let all hosts read the same files",
        )


def _build_saver(config: Config) -> CheckpointSaver | None:
    logging = config.logging
    if logging.save is None:
        return None
    return CheckpointSaver(
        logging.save,
        keep=logging.keep_checkpoints,
        keep_every=logging.keep_checkpoint_every,
        keep_best=logging.keep_best_checkpoint,
        in_background=logging.async_save,
    )


_Started = tuple[Student, Progress, StoredTrajectories]
"""A student with its weights, how far the run has come, and trajectories that it goes on with."""


def _build_student(config: Config, inputs: RunInputs, groups: ParallelGroups) -> _Started:
    model = build_model(inputs.architecture, config)
    resumed = inputs.resumed
    if inputs.source is not None and resumed is None:
        inputs.source.load_into(model)
        if inputs.starts_autoregressive and config.traits.diffusion_kind is not None:
            initialize_mask_embedding(
                model,
                inputs.special_tokens.mask_token_id,
                inputs.architecture.vocab_size,
                config.mask_embedding_init,
                groups.tp,
            )
    if config.lora.lora_rank is not None:
        attach_adapters_of_run(model, config.to_dict())
        train_adapters_only(model)
        if config.lora.lora_dropout > 0:
            drop_out_adapter_inputs(model, config.lora.lora_dropout, config.data.seed)
    student = build_student(model, config)
    if resumed is None:
        return student, Progress(), StoredTrajectories()
    verify = config.model.verify_checkpoint
    return student, *load_training_state(resumed.path, student, resumed.field, verify)


def _build_source(
    config: Config,
    inputs: RunInputs,
    student: Student,
    teacher: Teacher | None,
    examples: ExampleDataset | CorpusDataset | None,
    groups: ParallelGroups,
    stop: StopAgreement,
    progress: Progress,
) -> TrajectorySource:
    """What turns samples into trajectories: the student, given responses, or both."""
    if not config.uses_rollouts:
        return TrajectorySource(config, examples=examples)
    assert isinstance(inputs.data, PromptDataset)
    generation = GenerationConfig.from_config(
        config, inputs.diffusion_kind, config.model.block_size
    )
    engine: TrajectoryEngine
    if config.decodes_itself:
        engine = RolloutEngine(
            student.model,
            generation=generation,
            special_tokens=inputs.special_tokens,
            seed=config.data.seed,
            groups=groups,
            stop=stop,
        )
    else:
        # Only runs with servers need a client of HTTP.
        from megatron_dlm.training.rollout_servers import build_server_engine

        engine = build_server_engine(
            config, inputs, student, generation, groups, stop, lambda: progress.iteration
        )
    verifier = None
    if config.traits.verifies:
        reward = reward_of(config)
        verifier = Verifier(reward, inputs.tokenizer, config.rollout.max_tries, groups)
    on_finished = teacher.send_ahead if isinstance(teacher, RemoteTeacher) else None
    return TrajectorySource(config, inputs.data, engine, examples, verifier, on_finished)
