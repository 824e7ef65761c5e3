"""The configuration of a run: all groups of options, and values derived from several of them."""

import sys
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml

from megatron_dlm.config import fields, groups
from megatron_dlm.config import objective_traits as objectives
from megatron_dlm.config.coercion import build
from megatron_dlm.config.fields import NOT_AN_OPTION, option_fields, value_of
from megatron_dlm.config.parameter_groups import PARAM_GROUP_PRESETS, ParameterGroup
from megatron_dlm.config.rollout_engine import RolloutEngineConfig
from megatron_dlm.config.teacher_options import LAYOUT, TeacherConfig, TeacherPrecision
from megatron_dlm.types.diffusion_kind import DiffusionKind

DATA_OPTIONS = {"data": "train_data", "corpus": "data_path"}
HELD_OUT_OPTIONS = {"data": "valid_data", "corpus": "valid_data_path"}
"""Options that hold given responses and those held out from them, by where they come from."""


@dataclass(frozen=True)
class Config:
    """Configuration of a training run; flags win over the YAML file, which wins over defaults."""

    model: groups.ModelConfig = field(default_factory=groups.ModelConfig)
    lora: groups.LoRAConfig = field(default_factory=groups.LoRAConfig)
    parallel: groups.ParallelConfig = field(default_factory=groups.ParallelConfig)
    data: groups.DataConfig = field(default_factory=groups.DataConfig)
    template: groups.TemplateConfig = field(default_factory=groups.TemplateConfig)
    rollout: groups.RolloutConfig = field(default_factory=groups.RolloutConfig)
    engine: RolloutEngineConfig = field(default_factory=RolloutEngineConfig)
    objective: groups.ObjectiveConfig = field(default_factory=groups.ObjectiveConfig)
    distillation: groups.DistillationConfig = field(default_factory=groups.DistillationConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    self_distillation: groups.SelfDistillationConfig = field(
        default_factory=groups.SelfDistillationConfig
    )
    optimizer: groups.OptimizerConfig = field(default_factory=groups.OptimizerConfig)
    training: groups.TrainingConfig = field(default_factory=groups.TrainingConfig)
    held_out: groups.HeldOutConfig = field(default_factory=groups.HeldOutConfig)
    logging: groups.LoggingConfig = field(default_factory=groups.LoggingConfig)

    config: str | None = None
    """YAML file with the flags' names as keys; flags win over it. A key `base` names another file,
    relative to it, whose keys it changes or adds to (one level)."""
    dry_run: bool = False
    """Resolve and validate the configuration, print it and stop."""
    resume: Literal["auto", "never", "must"] = "auto"
    """What happens where --save holds a checkpoint of a run: the run goes on if nothing fixed has
    changed (auto); it is an error (never); it is an error if there is none (must)."""
    extend: bool = False
    """Stretch schedules without a length of their own over the new length of a resumed run."""
    num_records: Annotated[int | None, NOT_AN_OPTION] = None
    """Records of an epoch; None before the data have been read."""

    @property
    def traits(self) -> objectives.ObjectiveTraits:
        """Properties of the objective."""
        return objectives.OBJECTIVE_TRAITS[self.objective.objective]

    @property
    def diffusion_kind(self) -> DiffusionKind | None:
        """Kind of the trained model; None if it keeps its kind."""
        kind, options = self.traits.diffusion_kind, self.objective
        if kind is None:
            return None
        if kind.attention_pattern == "block_causal":
            return replace(kind, context_attention=options.context_attention)
        return replace(kind, attention_pattern=options.attention_pattern or kind.attention_pattern)

    @property
    def response_source(self) -> objectives.ResponseSource:
        """Where responses come from: the objective's first source with data, or its last."""
        *several, last = self.traits.response_sources
        return next((s for s in several if value_of(self, DATA_OPTIONS[s]) is not None), last)

    @property
    def data_option(self) -> str:
        """Name of the option that holds the run's data."""
        return DATA_OPTIONS.get(self.response_source, "prompts")

    @property
    def validation_option(self) -> str | None:
        """Name of the option that holds data held out from the run's; None if there are none."""
        name = HELD_OUT_OPTIONS.get(self.response_source)
        return name if name and value_of(self, name) is not None else None

    @property
    def evaluates(self) -> bool:
        """Whether the student answers held-out prompts in the course of training."""
        return self.held_out.eval_prompts is not None

    @property
    def decodes_left_to_right(self) -> bool:
        """Whether the trained model, as far as its objective tells, has no blocks to denoise."""
        kind, itself = self.diffusion_kind, self.traits.self_distillation
        return not itself if kind is None else kind.attention_pattern == "causal"

    @property
    def uses_rollouts(self) -> bool:
        """Whether the objective trains on the student's own rollouts."""
        return self.response_source == "rollout"

    @property
    def decodes_itself(self) -> bool:
        """Whether the training processes decode the rollouts, not servers."""
        return self.uses_rollouts and self.engine.rollout_engine == "internal"

    @property
    def shares_tokens_in_rollouts(self) -> bool:
        """Whether context-parallel ranks decode the same sequences, with a share of each."""
        shares = self.rollout.rollout_context_parallel == "tokens"
        return shares and self.parallel.context_parallel_size > 1

    @property
    def uses_teacher_responses(self) -> bool:
        """Whether all or some responses are the autoregressive teacher's."""
        options = self.rollout
        changes = options.teacher_response_fraction_schedule != "constant"
        end = options.final_teacher_response_fraction if changes else 0
        mixes = self.uses_rollouts and max(options.teacher_response_fraction, end) > 0
        return mixes or self.response_source == "teacher"

    @property
    def needs_teacher(self) -> bool:
        """Whether the run needs a separate teacher, for distributions, responses or both."""
        return self.uses_teacher_responses or (self.traits.uses_teacher and not self.teaches_itself)

    @property
    def teaches_itself(self) -> bool:
        """Whether the teacher is the student without its adapters: no second model is needed."""
        return self.traits.self_distillation and self.distillation.teacher_load is None

    @property
    def has_remote_teacher(self) -> bool:
        """Whether other processes than those of the student hold the teacher."""
        return self.teacher.teacher_ranks > 0 or bool(self.teacher.teacher_url)

    def student_ranks(self, world_size: int) -> int:
        """Processes of a job of so many that hold the student."""
        return world_size - self.teacher.teacher_ranks

    @property
    def teacher_precision(self) -> TeacherPrecision:
        """Precision of a teacher with weights of its own, default resolved."""
        return self.teacher.teacher_precision or ("bf16" if self.model.bf16 else "fp32")

    def of_teacher(self) -> Self:
        """The configuration that a teacher with weights of its own is built by.

        Its precision, and with `teacher_ranks` its layout; nothing of it is trained.
        """
        changes: dict[str, Any] = {"bf16": self.teacher_precision != "fp32", "fp8_format": None}
        if self.teacher.teacher_ranks:
            others = dict(num_virtual_stages_per_pipeline_rank=1, context_parallel_size=1)
            changes |= others | {"sequence_parallel": False}
            changes |= {name: value_of(self, f"teacher_{name}") for name in LAYOUT}
        return self.changed(**changes)

    @property
    def state_selection(self) -> objectives.StateSelection | None:
        """States that are trained on, default resolved; None for an autoregressive model."""
        return self.objective.state_selection or next(iter(self.traits.state_selections), None)

    @property
    def teacher_responses(self) -> str | None:
        """Folder of the teacher's responses, default resolved."""
        folder = self.logging.save and str(Path(self.logging.save) / "teacher_responses")
        return self.distillation.teacher_responses or folder

    @property
    def expert_tensor_parallel_size(self) -> int:
        """Processes that share one expert, default resolved."""
        own = self.parallel.expert_tensor_parallel_size
        return own or self.parallel.tensor_model_parallel_size

    @property
    def teacher_load(self) -> str | None:
        """Path of the teacher's weights, default resolved."""
        return self.distillation.teacher_load or self.model.load

    @property
    def longest_response(self) -> int:
        """Tokens of the longest response that any record can have."""
        limits = self.template.max_response_length_by_domain.values()
        return min(self.rollout.max_response_length, max(limits, default=sys.maxsize))

    @property
    def rollout_batch_size(self) -> int:
        """Samples of a rollout on all ranks; without rollouts, of an update."""
        batch = self.training.global_batch_size
        return self.rollout.rollout_batch_size if self.uses_rollouts else batch

    def changed(self, **options: Any) -> Self:
        """The same configuration with other values of some options, by their flat names."""
        return fields.with_values(self, options)

    def of_data(self, num_records: int) -> Self:
        """The same configuration, with the number of records of the data."""
        return replace(self, num_records=num_records)

    @property
    def num_samples(self) -> int:
        """Samples of the run; 0 if given in epochs and the data have not been read."""
        in_epochs = self.length_option == "num_epochs"
        unit = (self.num_records or 0) if in_epochs else self.rollout_batch_size
        return (value_of(self, self.length_option) or 0) * unit

    @property
    def num_rollouts(self) -> int:
        """Number of rollouts; the last may have fewer samples than `rollout_batch_size`."""
        return -(-self.num_samples // self.rollout_batch_size)

    @property
    def length_option(self) -> str:
        """Name of the option that says how long the run is."""
        by_batches = "num_rollouts" if self.uses_rollouts else "train_iters"
        return by_batches if self.training.num_epochs is None else "num_epochs"

    def updates_of(self, num_samples: int) -> int:
        """Optimizer steps on the samples of one rollout; the last may have fewer samples."""
        updates = -(-num_samples // self.training.global_batch_size)
        return updates * self.training.epochs_per_rollout

    @property
    def train_iters(self) -> int:
        """Optimizer steps of the run, 0 where `num_samples` is."""
        rollouts, rest = divmod(self.num_samples, self.rollout_batch_size)
        return rollouts * self.updates_of(self.rollout_batch_size) + self.updates_of(rest)

    @property
    def lr_scale(self) -> float:
        """Factor on all learning rates: sqrt(batch / its `lr_batch_size`) (RND1 section 3.3)."""
        batch = self.training.global_batch_size
        return float((batch / (self.optimizer.lr_batch_size or batch)) ** 0.5)

    @property
    def lr_warmup_iters(self) -> int:
        """Optimizer steps of the warm-up, from either option."""
        iters, fraction = self.optimizer.lr_warmup_iters, self.optimizer.lr_warmup_fraction
        return iters if fraction is None else round(fraction * self.lr_decay_iters)

    @property
    def param_groups(self) -> tuple[ParameterGroup, ...]:
        """Parameter groups, a preset resolved."""
        preset = self.optimizer.param_group_preset
        return self.optimizer.param_groups if preset is None else PARAM_GROUP_PRESETS[preset]

    @property
    def mask_embedding_init(self) -> groups.MaskEmbeddingInit:
        """Initial input embedding of MASK, default resolved."""
        is_trained = self.lora.lora_rank is None and self.optimizer.param_group_preset != "rnd1"
        return self.model.mask_embedding_init or ("keep" if is_trained else "mean")

    @property
    def lr_decay_iters(self) -> int:
        """Optimizer step at which the decay ends, default resolved."""
        return self.optimizer.lr_decay_iters or self.train_iters

    def to_dict(self) -> dict[str, Any]:
        """Flat dictionary of plain values, one entry a field; the inverse of `from_dict`."""
        names = (name for name in option_fields(Config) if name not in fields.INVOCATION_FIELDS)
        return {name: fields.plain_value(value_of(self, name)) for name in names}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "configuration") -> Self:
        """A configuration of plain values by name, else of defaults; see `coercion.build`."""
        return build(cls, values, source)

    def to_yaml(self) -> str:
        """YAML text in groups, which `--config` reads back to an equal configuration."""
        values, table, parts = self.to_dict(), option_fields(Config), []
        for group, names in groupby(values, key=lambda name: str(table[name].group)):
            title = (getattr(self, group).__doc__ or "").splitlines()[0]
            members = {name: values[name] for name in names}
            # Non-ASCII text is escaped: PyYAML writes line separators that it then reads as spaces.
            parts.append(f"# {title}\n{yaml.safe_dump(members, sort_keys=False, width=100)}")
        return "\n".join(parts)
