"""The interface of an objective; a new one is a file here and a line in registry and traits.

P, L: prompt and response tokens of a trajectory; T: tokens of the document made of it; n:
supervised tokens; h: hidden size; V/tp: vocabulary shard.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dlm.accounting.flops import visible_pairs
from megatron_dlm.config.schema import Config
from megatron_dlm.data.packing import TrainingBatch, document_layout, pack_rows
from megatron_dlm.models.row_packing import RowPacking
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
        hidden: [n, h], hidden states of the student.
        head: [V/tp, h], output layer of the student.
        labels: [n] int64, token ids to predict.
        weights: [n] float32, loss weights.
        tp_group: Tensor-parallel group; None for a group of one.
        targets: The teacher's n targets, or None.
        teacher_head: [V/tp, h_teacher], output layer of the teacher for `HiddenTargets`, else None.
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
        diffusion_kind: How the model attends and predicts in rollouts.
    """

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
            trajectory: A rollout, or an example that was read.
            generator: Source of every random choice; seeded per sample, so that results do not
                depend on the parallel layout.
        """

    def update_document(self, trajectory: Trajectory, epoch: int, iteration: int) -> Document:
        """The document of one trajectory in an optimizer update.

        Args:
            trajectory: As in `document`.
            epoch: Pass over the rollout batch, from 0; with the sample, keys draws of `document`.
            iteration: Updates done before this one; a key of the draws inside layers (dropout).
        """
        generator = keyed_generator(self.config.data.seed, trajectory.sample_index, epoch)
        document = self.document(trajectory, generator)
        return with_token_keys(document, self.config, trajectory.sample_index, iteration)

    def expected_size(self, trajectory: Trajectory) -> tuple[int, int, int]:
        """Size of an update's document: tokens, pairs of a query and a key that it sees, logits.

        Known before the teacher is asked; later epochs and updates draw other states. From it, the
        cost of training on a trajectory is predicted.
        """
        generator = keyed_generator(self.config.data.seed, trajectory.sample_index, 0)
        document = self.document(trajectory, generator)
        # Annealed attention, which draws each pair, is taken for what it becomes.
        pairs = visible_pairs(document_layout(document)[:4])
        return len(document.token_ids), pairs, len(document.supervised)

    def rows(self, documents: Sequence[Document], pad_multiple: int = 1) -> list[TrainingBatch]:
        """The packed rows of micro-batches.

        Args:
            documents: At least one.
            pad_multiple: Each row is padded to a multiple of this.
        """
        row_mean = self.config.objective.loss_normalization == "row_mean"
        packing = RowPacking.of(self.config)
        return pack_rows(documents, packing, pad_multiple=pad_multiple, row_mean=row_mean)

    @abstractmethod
    def loss(self, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        """Weighted loss sum over the supervised tokens.

        Returns:
            The sum, a scalar with gradient, and the unweighted loss per token [n] without gradient.
        """
