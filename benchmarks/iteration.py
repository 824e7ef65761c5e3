"""What an iteration needs, with random weights at a shape and without files: for measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.accounting.flops import BACKWARD, ForwardFlops, visible_pairs
from megatron_dlm.config import Config, DecodingConfig
from megatron_dlm.config.groups import RolloutGraphs
from megatron_dlm.data.packing import TrainingBatch
from megatron_dlm.models.architecture import Architecture, architecture_from_hf
from megatron_dlm.models.attention_layout import PADDING_DOCUMENT, Field
from megatron_dlm.models.forward import row_multiple
from megatron_dlm.models.model import head_weight
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.objectives import OBJECTIVES
from megatron_dlm.objectives.base import Objective
from megatron_dlm.parallel import ParallelGroups, initialized
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.training.context_shares import own_shares
from megatron_dlm.training.student import Student, build_student
from megatron_dlm.training.train_step import StepResult, train_step
from megatron_dlm.types.diffusion_kind import BLOCK_DIFFUSION
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.teacher_targets import HiddenTargets
from megatron_dlm.types.trajectory import Prompt, Trajectory

PROMPT = 64
"""Tokens of a prompt."""


@dataclass(frozen=True)
class Iteration:
    """A student, the output layer of a teacher, and how they are trained.

    Attributes:
        config: Options.
        architecture: Of student and teacher.
        student: With random weights.
        teacher_head: [V / tp, h]; None before the last stage.
        objective: `opdlm_off`: one random state of a response, so no rollout is needed.
        groups: Process groups.
        tokens: Special tokens.
    """

    config: Config
    architecture: Architecture
    student: Student
    teacher_head: Tensor | None
    objective: Objective
    groups: ParallelGroups
    tokens: SpecialTokens

    def rows(self, lengths: Sequence[int]) -> list[TrainingBatch]:
        """This rank's micro-batches of random responses, packed and shared as in training.

        Args:
            lengths: Tokens that each response takes up in a row, prompt and both streams.
        """
        documents = [
            self.objective.update_document(self._trajectory(i, length), 0, 0)
            for i, length in enumerate(lengths)
        ]
        multiple = row_multiple(self.student.model)
        return own_shares(self.objective.rows(documents, multiple), self.groups, multiple)

    def _trajectory(self, index: int, length: int) -> Trajectory:
        generator = torch.Generator().manual_seed(index)
        block = self.config.model.block_size
        response = max(1, (length - PROMPT) // 2 // block) * block
        ids = torch.randint(0, 500, (PROMPT + response,), generator=generator)
        hidden = torch.empty(
            response,
            self.architecture.hidden_size,
            dtype=self.student.model.config.params_dtype,
            device=platform.device(),
        )
        return Trajectory(
            sample_index=index,
            prompt_ids=ids[:PROMPT],
            response_ids=ids[PROMPT:],
            unmask_step=torch.zeros(response, dtype=torch.int64),
            finish_reason="length",
            targets=HiddenTargets(hidden.normal_()),
        )

    def useful_flops(self, rows: Sequence[TrainingBatch]) -> int:
        """FLOPs that an update of rows needs (`accounting.flops`): the teacher's logits too."""
        flops, total = ForwardFlops.of(self.architecture), 0
        for row in rows:
            layout, supervised = row.row.attention, len(row.supervised)
            assert isinstance(layout, Tensor)
            tokens = int((layout[Field.DOCUMENT] != PADDING_DOCUMENT).sum())
            forward = flops.forward(tokens, visible_pairs(layout), supervised)
            total += (1 + BACKWARD) * forward + flops.forward(0, 0, supervised)
        return total

    def update(self, rows: Sequence[TrainingBatch]) -> StepResult:
        """One update of the weights."""
        student = self.student
        return train_step(
            student.ddp,
            student.optimizer,
            student.scheduler,
            self.objective,
            rows,
            self.teacher_head,
            self.groups,
        )

    def engine(
        self, rollout_graphs: RolloutGraphs = DecodingConfig.rollout_graphs, **options: Any
    ) -> RolloutEngine:
        """A rollout engine for the student; further arguments are those of the engine."""
        generation = GenerationConfig.from_config(
            self.config, BLOCK_DIFFUSION, self.config.model.block_size
        )
        return RolloutEngine(
            self.student.model,
            generation=replace(generation, rollout_graphs=rollout_graphs),
            special_tokens=self.tokens,
            seed=0,
            groups=self.groups,
            **options,
        )

    def prompts(self, number: int, length: int = PROMPT) -> list[Prompt]:
        """Prompts of random tokens."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 500, (number, length), generator=generator)
        return [Prompt(i, row) for i, row in enumerate(ids)]


@contextmanager
def iteration(
    model: dict[str, Any], *, copies_head: bool = True, **options: Any
) -> Iterator[Iteration]:
    """Build everything, within process groups that end with it.

    Args:
        model: A Hugging Face config.json.
        copies_head: Whether a copy of the student's output layer is the teacher's; else there is
            none.
        options: Of a run of `opdlm_off`.
    """
    values = {"objective": "opdlm_off", "num_rollouts": 10, "rollout_batch_size": 8, "lr": 1e-6}
    config = Config().changed(**{**values, "global_batch_size": 8, **options})
    architecture = architecture_from_hf(model)
    vocab_size = architecture.vocab_size
    with initialized(config):
        tokens = SpecialTokens(510, 508, 511, vocab_size=vocab_size)
        student = build_student(build_model(architecture, config), config)
        yield Iteration(
            config=config,
            architecture=architecture,
            student=student,
            teacher_head=head_weight(student.model).detach().clone() if copies_head else None,
            objective=OBJECTIVES["opdlm_off"](config, tokens.mask_token_id, vocab_size),
            groups=ParallelGroups.from_parallel_state(),
            tokens=tokens,
        )
