"""A training run, put together: student, teacher, objective, trajectories, progress."""

from dataclasses import dataclass
from typing import Any

from megatron_dlm import platform
from megatron_dlm.config import Config
from megatron_dlm.data.prompts import ExampleDataset, PromptDataset
from megatron_dlm.data.sampler import ShuffledSampler
from megatron_dlm.distillation.self_teacher import SelfTeacher
from megatron_dlm.distillation.teacher import Teacher
from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.rewards import REWARDS
from megatron_dlm.models.lora import train_adapters_only
from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.models.model_provider import build_model, build_teacher
from megatron_dlm.objectives import OBJECTIVES
from megatron_dlm.objectives.base import Objective
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.training.checkpointing import (
    Progress,
    attach_adapters_of_run,
    has_training_state,
    load_training_state,
    save_checkpoint,
    saved_config,
)
from megatron_dlm.training.inputs import RunInputs
from megatron_dlm.training.student import Student, build_student
from megatron_dlm.training.teacher_responses import teacher_responses
from megatron_dlm.training.trajectory_source import TrajectorySource
from megatron_dlm.training.verified_rollout import Verifier

RESUME_FIXED = (
    "objective",
    "seed",
    "shuffle",
    "block_size",
    "rollout_batch_size",
    "global_batch_size",
    "epochs_per_rollout",
    "bf16",
    "use_distributed_optimizer",
    "optimizer",
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_warmup_iters",
    "lr_decay_iters",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "param_groups",
    "lora_rank",
    "lora_alpha",
    "lora_target_modules",
)
"""Options that a resumed run cannot change: it would be another run, or they would be ignored, as
they live on in the checkpointed optimizer and schedule."""


DATA_FINGERPRINT = "data_fingerprint"


@dataclass
class Run:
    """One rank's part of a training run."""

    config: Config
    inputs: RunInputs
    student: Student
    teacher: Teacher | SelfTeacher | None
    objective: Objective
    source: TrajectorySource
    sampler: ShuffledSampler
    progress: Progress

    def save(self) -> None:
        """Publish a checkpoint of the current progress in the run folder."""
        folder = self.config.logging.save
        if folder is not None:
            save_checkpoint(
                folder,
                self.student.model,
                hf_config=self.inputs.hf_config(self.config),
                tokenizer_folder=self.inputs.tokenizer_folder,
                progress=self.progress,
                student=self.student,
                run_config=_resumable_config(self.config, self.inputs),
                keep=self.config.logging.keep_checkpoints,
            )


def _resumable_config(config: Config, inputs: RunInputs) -> dict[str, Any]:
    """The flat configuration with what a resumed run is compared by, resolved."""
    return config.to_dict() | {
        "lr_decay_iters": config.lr_decay_iters,
        DATA_FINGERPRINT: inputs.data.file.fingerprint,
    }


def _check_resumable(config: Config, inputs: RunInputs, load: str) -> None:
    now, before = _resumable_config(config, inputs), saved_config(load)
    if before.get(DATA_FINGERPRINT, now[DATA_FINGERPRINT]) != now[DATA_FINGERPRINT]:
        raise bad_value(
            "--prompts" if isinstance(inputs.data, PromptDataset) else "--train-data",
            inputs.data.file.path,
            f"is not the file that the run in {load} was reading",
            "name that file to resume it, or --finetune for a new run from its weights",
        )
    for name in RESUME_FIXED:
        if name in before and before[name] != now[name]:
            raise bad_value(
                "--" + name.replace("_", "-"),
                now[name],
                f"the run in {load} was started with {before[name]!r}",
                f"use {before[name]!r} to resume it, or --finetune for a new run from its weights",
            )


def _teacher(
    config: Config, inputs: RunInputs
) -> tuple[DiffusionGPTModel | None, ExampleDataset | None]:
    """The teacher, if training asks it for distributions, and the responses that are given."""
    examples = inputs.data if isinstance(inputs.data, ExampleDataset) else None
    if inputs.teacher_source is None:
        return None, examples
    model = build_teacher(inputs.teacher_source.architecture, config)
    inputs.teacher_source.load_into(model)
    if config.uses_teacher_responses:
        examples = teacher_responses(config, inputs, model)
    return (model if config.traits.uses_teacher else None), examples


def build_run(config: Config, inputs: RunInputs) -> Run:
    """Build models, load weights, and resume where `--load` is a run.

    Process groups must exist (`training.initialize`).

    Raises:
        UserError: A checkpoint does not fit, or a resumed run was started with other options.
    """
    load = config.model.load
    resume = (
        load is not None
        and inputs.source is not None
        and inputs.source.is_megatron
        and not config.model.finetune
        and has_training_state(load)
    )
    if resume:
        assert load is not None
        _check_resumable(config, inputs, load)
    parallel = config.parallel
    split = max(parallel.expert_model_parallel_size, parallel.pipeline_model_parallel_size)
    if inputs.source is None and split > 1 and not platform.is_cuda():
        raise bad_value(
            "--model-config",
            config.model.model_config,
            "random weights on a CPU would repeat themselves over expert and pipeline ranks",
            "start with both sizes 1, and load that checkpoint at any layout",
        )
    teacher_model, examples = _teacher(config, inputs)
    model = build_model(inputs.architecture, config)
    if inputs.source is not None and not resume:
        inputs.source.load_into(model)
    if config.lora.lora_rank is not None:
        attach_adapters_of_run(model, config.to_dict())
        train_adapters_only(model)
    student = build_student(model, config)
    progress = Progress()
    if resume:
        assert load is not None
        progress = load_training_state(load, student)
    objective = OBJECTIVES[config.objective.objective](
        config,
        inputs.special_tokens.mask_token_id,
        inputs.architecture.vocab_size,
        inputs.convention(config),
    )
    teacher: Teacher | SelfTeacher | None = None
    if config.traits.self_distillation:
        teacher = SelfTeacher(
            teacher_model or student.model,
            config,
            mask_token_id=inputs.special_tokens.mask_token_id,
            vocab_size=inputs.architecture.vocab_size,
            shifted=inputs.convention(config).shifted,
        )
    elif teacher_model is not None:
        teacher = Teacher(teacher_model, config.training.micro_batch_size)
    source = TrajectorySource(config, examples=examples)
    if config.uses_rollouts:
        assert isinstance(inputs.data, PromptDataset)
        engine = RolloutEngine(
            student.model,
            generation=GenerationConfig.from_config(config),
            eos_token_id=inputs.special_tokens.eos_token_id,
            pad_token_id=inputs.special_tokens.pad_token_id,
            mask_token_id=inputs.special_tokens.mask_token_id,
            vocab_size=inputs.architecture.vocab_size,
            seed=config.data.seed,
        )
        verifier = None
        if config.traits.verifies:
            reward = REWARDS[config.objective.reward]
            verifier = Verifier(reward, inputs.tokenizer, config.rollout.max_tries)
        source = TrajectorySource(config, inputs.data, engine, examples, verifier)
    sampler = ShuffledSampler(len(inputs.data), config.data.seed, config.data.shuffle)
    return Run(config, inputs, student, teacher, objective, source, sampler, progress)
