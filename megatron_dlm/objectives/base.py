"""What every objective provides; a new one is a file here and a line in registry and traits.

P, L: prompt and response tokens of a trajectory; T: tokens of the document made of it; n:
supervised tokens; h: hidden size; V/tp: vocabulary shard.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_dlm.config.objective_traits import ObjectiveTraits
from megatron_dlm.config.schema import Config
from megatron_dlm.data.packing import TrainingBatch, pack
from megatron_dlm.objectives.token_keys import with_token_keys
from megatron_dlm.seeding import keyed_generator
from megatron_dlm.types.diffusion_kind import BLOCK_DIFFUSION, DiffusionKind
from megatron_dlm.types.document import Document
from megatron_dlm.types.teacher_targets import TeacherTargets
from megatron_dlm.types.trajectory import Trajectory


@dataclass(frozen=True)
class LossInputs:
    """What a loss is computed from, on the last pipeline stage.

    Attributes:
        hidden: [n, h] of the student.
        head: [V/tp, h] of the student.
        labels: [n].
        weights: [n].
        tp_group: Tensor-parallel group; None for a group of one.
        targets: [n] of the teacher, or None.
        teacher_head: [V/tp, h_teacher], the output layer for `HiddenTargets`, else None.
    """

    hidden: Tensor
    head: Tensor
    labels: Tensor
    weights: Tensor
    tp_group: torch.distributed.ProcessGroup | None = None
    targets: TeacherTargets | None = None
    teacher_head: Tensor | None = None


class Objective(ABC):
    """Turns trajectories into training documents and hidden states into a loss.

    Attributes:
        traits: What it needs; its line in `config.objective_traits.OBJECTIVE_TRAITS`.
        diffusion_kind: Attention and prediction of the model in rollouts.
    """

    traits: ClassVar[ObjectiveTraits]

    def __init__(
        self,
        config: Config,
        mask_token_id: int,
        vocab_size: int,
        diffusion_kind: DiffusionKind = BLOCK_DIFFUSION,
    ) -> None:
        self.config = config
        self.mask_token_id = mask_token_id
        self.vocab_size = vocab_size
        self.diffusion_kind = diffusion_kind

    @abstractmethod
    def document(self, trajectory: Trajectory, generator: torch.Generator) -> Document:
        """Lay out one trajectory.

        Args:
            trajectory: What was generated or read.
            generator: Source of every random choice; seeded per sample, so that results do not
                depend on the parallel layout.
        """

    @property
    def max_row_tokens(self) -> int | None:
        """Tokens of the longest row before padding; None leaves a micro-batch in one row."""
        return None

    def update_document(self, trajectory: Trajectory, epoch: int, iteration: int) -> Document:
        """The document of one trajectory in an optimizer update.

        Args:
            trajectory: As in `document`.
            epoch: Of the rollout batch, from 0; keys the draws of `document` with the sample.
            iteration: Updates done before this one; keys what layers draw.
        """
        generator = keyed_generator(self.config.data.seed, trajectory.sample_index, epoch)
        document = self.document(trajectory, generator)
        return with_token_keys(document, self.config, trajectory.sample_index, iteration)

    def row(self, documents: Sequence[Document], pad_multiple: int) -> TrainingBatch:
        """The packed row of one micro-batch.

        Args:
            documents: At least one.
            pad_multiple: What the length of the row must be a multiple of.
        """
        row_mean = self.config.objective.loss_normalization == "row_mean"
        return pack(documents, pad_multiple=pad_multiple, row_mean=row_mean)

    @abstractmethod
    def loss(self, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        """Weighted loss sum over the supervised tokens.

        Returns:
            The sum, a scalar with gradient, and the unweighted loss per token [n] without.
        """
