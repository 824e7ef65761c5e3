"""Parallel layouts of a run, and which of them training accepts."""

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from typing import Any

from megatron_dlm.config import Config, validate, validate_architecture, validate_layout
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.types.model_sizes import ModelSizes

NEARBY = 8
"""So many more or fewer GPUs are looked at where a number of them has no layout."""

MOST_NEARBY = 4096
"""Of more GPUs there are too many layouts to look at those of other numbers."""

GPUS_PER_NODE = 8
"""Tensor-parallel groups, which exchange in every layer, stay within a node."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the groups that a run's GPUs are split into.

    Attributes:
        tensor: Ranks that share every layer (TP).
        pipeline: Stages (PP).
        context: Ranks that share a row (CP).
        expert: Ranks that share the experts of a layer (EP).
        expert_tensor: Ranks that share one expert (ETP).
        gpus: Of the run.
    """

    tensor: int
    pipeline: int
    context: int
    expert: int
    expert_tensor: int
    gpus: int

    @classmethod
    def of(cls, config: Config, gpus: int) -> "Layout":
        """The layout that a configuration states."""
        p = config.parallel
        return cls(
            tensor=p.tensor_model_parallel_size,
            pipeline=p.pipeline_model_parallel_size,
            context=p.context_parallel_size,
            expert=p.expert_model_parallel_size,
            expert_tensor=config.expert_tensor_parallel_size,
            gpus=gpus,
        )

    @property
    def replicas(self) -> int:
        """Shares of an update's rows (DP)."""
        return self.gpus // (self.tensor * self.pipeline * self.context)

    @property
    def dense_copies(self) -> int:
        """Ranks that hold the same parameters outside of experts: copies of the model.

        They share its optimizer, and a rollout's prompts.
        """
        return self.gpus // (self.tensor * self.pipeline)

    def decoders(self, config: Config) -> int:
        """Replicas that decode sequences of their own: copies of the model, or groups of them."""
        return self.replicas if config.shares_tokens_in_rollouts else self.dense_copies

    def sharing(self, config: Config) -> int:
        """Ranks that share each sequence in decoding, and its keys and values."""
        return self.context if config.shares_tokens_in_rollouts else 1

    @property
    def expert_copies(self) -> int:
        """Ranks that hold the same experts."""
        return self.gpus // (self.expert * self.expert_tensor * self.pipeline)

    def options(self, *, is_moe: bool) -> dict[str, Any]:
        """The options that ask for it."""
        return {
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
            "context_parallel_size": self.context,
            "expert_model_parallel_size": self.expert,
            "expert_tensor_parallel_size": self.expert_tensor if is_moe else None,
            "sequence_parallel": self.tensor > 1,
        }

    def __str__(self) -> str:
        sizes = {
            "TP": self.tensor,
            "PP": self.pipeline,
            "CP": self.context,
            "EP": self.expert,
            "DP": self.replicas,
        }
        names = [f"{name}{size}" for name, size in sizes.items() if size > 1] or ["DP1"]
        if self.expert_tensor != self.tensor:
            names.insert(-1, f"ETP{self.expert_tensor}")
        return " ".join(names)


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]


def candidates(gpus: int, model: ModelSizes) -> Iterator[Layout]:
    """Layouts of so many GPUs whose sizes divide the model."""
    experts = model.num_moe_experts
    tensors = _divisors(model.num_query_groups, min(gpus, GPUS_PER_NODE))
    stages = _divisors(model.num_layers, gpus)
    for tensor, pipeline, context in product(tensors, stages, (1, 2, 4, 8)):
        if gpus % (tensor * pipeline * context):
            continue
        for expert in _divisors(experts or 1, gpus // pipeline):
            for expert_tensor in sorted({1, tensor}) if experts else [tensor]:
                if (gpus // pipeline) % (expert * expert_tensor) == 0:
                    yield Layout(tensor, pipeline, context, expert, expert_tensor, gpus)


def larger_batches(
    config: Config, gpus: int, student: ModelSizes, teacher: ModelSizes | None
) -> list[tuple[Layout, Config]]:
    """Layouts with more replicas than the batch has rows, each with a batch of one row a replica.

    Learning rates follow by `lr_batch_size`; a rollout has at least the prompts of an update.
    """
    found, training = list[tuple[Layout, Config]](), config.training
    for layout in candidates(gpus, student):
        batch = training.micro_batch_size * layout.replicas
        if batch <= training.global_batch_size:
            continue
        rates_of = config.optimizer.lr_batch_size or training.global_batch_size
        options = {"global_batch_size": batch, "lr_batch_size": rates_of}
        if config.uses_rollouts:
            unit = math.lcm(batch, layout.dense_copies)
            options["rollout_batch_size"] = -(-config.rollout_batch_size // unit) * unit
        with suppress(UserError):
            found.append(_checked(config.changed(**options), layout, student, teacher))
    _validate_one(found)
    return found


def accepted(
    config: Config, gpus: int, student: ModelSizes, teacher: ModelSizes | None
) -> list[tuple[Layout, Config]]:
    """The layouts that training accepts for a configuration, by the rules that it asks itself.

    Raises:
        UserError: None of them: the numbers of GPUs nearby that have one; without those, the
            refusal of the layout that the configuration states, or of the last one. Or something
            else is wrong.
    """
    found, refusal = _accepted(config, gpus, student, teacher)
    if not found:
        near = _numbers_nearby(config, gpus, student, teacher)
        larger = larger_batches(config, gpus, student, teacher)
        if near or larger:
            others = config.teacher.teacher_ranks
            remedies = [str(number + others) for number in near]
            remedies += ["add --larger-batch"] if larger else []
            raise bad_value(
                "--gpus",
                gpus + others,
                "no layout of so many divides the model and its batches",
                f"{'choose ' if near else ''}{' or '.join(remedies)}",
            )
        validate(config, gpus + config.teacher.teacher_ranks)
        validate_architecture(config, student, teacher)
        assert refusal is not None
        raise refusal
    _validate_one(found)
    return found


def _accepted(
    config: Config, gpus: int, student: ModelSizes, teacher: ModelSizes | None
) -> tuple[list[tuple[Layout, Config]], UserError | None]:
    """The layouts that training accepts, and the last refusal of another one."""
    found, refusal = list[tuple[Layout, Config]](), None
    for layout in candidates(gpus, student):
        try:
            found.append(_checked(config, layout, student, teacher))
        except UserError as error:
            refusal = error
    return found, refusal


def _numbers_nearby(
    config: Config, gpus: int, student: ModelSizes, teacher: ModelSizes | None
) -> list[int]:
    """The next numbers of GPUs, fewer and more, that have a layout; fewer also far below."""
    reach = NEARBY if gpus <= MOST_NEARBY else 0
    below = [*range(gpus - 1, max(gpus - reach, 1) - 1, -1)]
    power = 1 << (min(gpus // 2, MOST_NEARBY).bit_length() - 1) if gpus > 1 else 0
    while power:
        below.append(power)
        power //= 2
    sides = below, range(gpus + 1, gpus + reach + 1)
    nearest = (
        next((n for n in side if _accepted(config, n, student, teacher)[0]), None) for side in sides
    )
    return [number for number in nearest if number is not None]


def _checked(
    config: Config, layout: Layout, student: ModelSizes, teacher: ModelSizes | None
) -> tuple[Layout, Config]:
    """A layout with the configuration that asks for it.

    Raises:
        UserError: Training does not accept it.
    """
    options = layout.options(is_moe=student.num_moe_experts is not None)
    if layout.pipeline == 1:  # there are no stages that could have several chunks or groups
        options |= {"num_virtual_stages_per_pipeline_rank": 1, "decoding_groups": None}
    if layout.context == 1:
        options |= {"rollout_context_parallel": "sequences"}
    changed = config.changed(**options)
    validate_layout(changed, layout.gpus, student, teacher)
    return layout, changed


def _validate_one(found: list[tuple[Layout, Config]]) -> None:
    """Check the rest of the rules, which no layout changes."""
    for layout, config in found[:1]:
        validate(config, layout.gpus + config.teacher.teacher_ranks)
