"""The interface of a teacher."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from megatron_dlm.models.model import StageModel
from megatron_dlm.types.trajectory import Trajectory


class Teacher(Protocol):
    """Adds its predictions to the trajectories of a rollout batch."""

    @property
    def model(self) -> StageModel | None:
        """This rank's part of the model; None for a teacher that is not in memory."""

    @property
    def head(self) -> Tensor | None:
        """Vocabulary shard [V/tp, h] of the output layer, for `HiddenTargets`; else None.

        Only the last pipeline stage has it.
        """

    def annotate(self, trajectories: Sequence[Trajectory]) -> None:
        """Set `targets` of each trajectory; all ranks call this."""
