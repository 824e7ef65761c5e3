"""A training run, put together: student, teacher, objective, trajectories, progress."""

from dataclasses import dataclass
from typing import Any

from megatron_dlm import platform
from megatron_dlm.config import Config
from megatron_dlm.config.fields import option_fields, plain_value
from megatron_dlm.config.usage_rules import is_used
from megatron_dlm.data.prompts import PromptDataset
from megatron_dlm.data.sampler import ShuffledSampler
from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.rewards import REWARDS
from megatron_dlm.models.lora import drop_out_adapter_inputs, train_adapters_only
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.objectives import OBJECTIVES
from megatron_dlm.objectives.base import Objective
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.teacher.base import Teacher
from megatron_dlm.teacher.building import choose_teacher, self_teacher
from megatron_dlm.teacher.frozen import FrozenTeacher
from megatron_dlm.teacher.self_teacher import SelfTeacher
from megatron_dlm.teacher.stored import StoredTeacher
from megatron_dlm.training.checkpointing import (
    Progress,
    attach_adapters_of_run,
    load_training_state,
    save_checkpoint,
    saved_config,
)
from megatron_dlm.training.inputs import RunInputs, resumes
from megatron_dlm.training.mask_embedding import initialize_mask_embedding
from megatron_dlm.training.offload import PhaseOffload, build_offload
from megatron_dlm.training.student import Student, build_student
from megatron_dlm.training.trajectory_source import TrajectorySource
from megatron_dlm.training.validation import Validation
from megatron_dlm.training.verified_rollout import Verifier

RESUME_FIXED = tuple(
    name for name, option in option_fields(Config).items() if option.fixed_on_resume
)
"""Options that a resumed run cannot change, where it has a use for them: it would be another run,
or they would be ignored, as they live on in the checkpointed optimizer and schedule."""

DATA_FINGERPRINT = "data_fingerprint"
TEACHER_FINGERPRINT = "teacher_fingerprint"


@dataclass
class Run:
    """One rank's part of a training run."""

    config: Config
    inputs: RunInputs
    student: Student
    teacher: Teacher | None
    objective: Objective
    source: TrajectorySource
    sampler: ShuffledSampler
    progress: Progress
    offload: PhaseOffload
    validation: Validation | None = None

    def save(self) -> None:
        """Publish a checkpoint of the current progress in the run folder."""
        folder = self.config.logging.save
        if folder is not None:
            save_checkpoint(
                folder,
                self.student.model,
                hf_config=self.inputs.hf_config(self.config),
                generation_config=self.inputs.architecture.generation_config,
                tokenizer_folder=self.inputs.tokenizer_folder,
                progress=self.progress,
                student=self.student,
                run_config=_resumable_config(self.config, self.inputs),
                keep=self.config.logging.keep_checkpoints,
                keep_every=self.config.logging.keep_checkpoint_every,
            )


def _resumable_config(config: Config, inputs: RunInputs) -> dict[str, Any]:
    """The flat configuration with what a resumed run is compared by, resolved."""
    attention_pattern: str | None = None
    if config.traits.chooses_attention and config.convention is not None:
        attention_pattern = config.convention.attention_pattern
    return config.to_dict() | {
        "attention_pattern": attention_pattern,
        "lr_decay_iters": config.lr_decay_iters,
        "lr_warmup_iters": config.lr_warmup_iters,
        "teacher_response_fraction_rollouts": config.teacher_response_fraction_rollouts,
        "dynamic_threshold_rollouts": config.dynamic_threshold_rollouts,
        "param_groups": [plain_value(group) for group in config.param_groups],
        DATA_FINGERPRINT: inputs.data.file.fingerprint,
        "num_records": config.num_records,
        TEACHER_FINGERPRINT: inputs.teacher_fingerprint,
    }


def _check_resumable(config: Config, inputs: RunInputs, load: str) -> None:
    now, before = _resumable_config(config, inputs), saved_config(load)
    if "num_rollouts" in before:
        before = {"teacher_response_fraction_rollouts": before["num_rollouts"], **before}
    if before.get(DATA_FINGERPRINT, now[DATA_FINGERPRINT]) != now[DATA_FINGERPRINT]:
        raise bad_value(
            "--" + config.data_option.replace("_", "-"),
            inputs.data.file.path,
            f"is not what the run in {load} was reading",
            "name that to resume it, or --finetune for a new run from its weights",
        )
    for name in RESUME_FIXED:
        if name in before and before[name] != now[name] and is_used(config, name):
            raise bad_value(
                "--" + name.replace("_", "-"),
                now[name],
                f"the run in {load} was started with {before[name]!r}",
                f"use {before[name]!r} to resume it, or --finetune for a new run from its weights",
            )
    records = now["num_records"]
    if before.get("num_records", records) != records:
        raise bad_value(
            "--max-prompt-length",
            config.data.max_prompt_length,
            f"leaves {records} records of {inputs.data.file.path}, the run in {load} was reading "
            f"{before['num_records']}",
            "choose what it was to resume it, or --finetune for a new run from its weights",
        )
    if before.get(TEACHER_FINGERPRINT, now[TEACHER_FINGERPRINT]) != now[TEACHER_FINGERPRINT]:
        problem, remedy = f"the run in {load} was its own teacher", "drop it"
        if before[TEACHER_FINGERPRINT] is not None:
            named = before["teacher_load"] or before["load"]
            problem = f"is not the teacher of the run in {load}, {named!r} as it was then"
            remedy = "name those weights, wherever they are,"
        raise bad_value(
            "--teacher-load",
            config.distillation.teacher_load,
            problem,
            f"{remedy} to resume it, or --finetune for a new run from its weights",
        )


def build_run(config: Config, inputs: RunInputs) -> Run:
    """Build models, load weights, and resume where `--load` is a run.

    Process groups must exist (`parallel`).

    Raises:
        UserError: A checkpoint does not fit, or a resumed run was started with other options.
    """
    config = config.of_data(len(inputs.data))
    load = config.model.load
    resume = resumes(config, inputs.source)
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
    sampler = ShuffledSampler(len(inputs.data), config.data.seed, config.data.shuffle)
    teacher: Teacher | None
    teacher, examples = choose_teacher(config, inputs, sampler)
    model = build_model(inputs.architecture, config)
    if inputs.source is not None and not resume:
        inputs.source.load_into(model)
        if inputs.starts_autoregressive and config.traits.convention is not None:
            initialize_mask_embedding(
                model,
                inputs.special_tokens.mask_token_id,
                inputs.architecture.vocab_size,
                config.mask_embedding_init,
            )
    if config.lora.lora_rank is not None:
        attach_adapters_of_run(model, config.to_dict())
        train_adapters_only(model)
        if config.lora.lora_dropout > 0:
            drop_out_adapter_inputs(model, config.lora.lora_dropout, config.data.seed)
    student = build_student(model, config)
    progress = Progress()
    if resume:
        assert load is not None
        progress = load_training_state(load, student, verify=config.model.verify_checkpoint)
    convention = inputs.convention(config)
    objective = OBJECTIVES[config.objective.objective](
        config,
        inputs.special_tokens.mask_token_id,
        inputs.architecture.vocab_size,
        convention,
    )
    if config.traits.self_distillation:
        teacher = self_teacher(config, inputs, student.model)
    source = TrajectorySource(config, examples=examples)
    if config.uses_rollouts:
        assert isinstance(inputs.data, PromptDataset)
        engine = RolloutEngine(
            student.model,
            generation=GenerationConfig.from_config(config, convention, config.model.block_size),
            special_tokens=inputs.special_tokens,
            vocab_size=inputs.architecture.vocab_size,
            seed=config.data.seed,
        )
        verifier = None
        if config.traits.verifies:
            reward = REWARDS[config.objective.reward]
            verifier = Verifier(reward, inputs.tokenizer, config.rollout.max_tries)
        source = TrajectorySource(config, inputs.data, engine, examples, verifier)
    offload = build_offload(config, student, teacher)
    validation = None
    if inputs.held_out is not None:
        validation = Validation(config, objective, inputs.held_out)
    return Run(
        config, inputs, student, teacher, objective, source, sampler, progress, offload, validation
    )
