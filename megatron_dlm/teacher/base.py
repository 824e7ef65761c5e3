"""What every teacher provides."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.types.trajectory import Trajectory


class Teacher(Protocol):
    """Says what it would have predicted, once over each rollout batch."""

    @property
    def model(self) -> DiffusionGPTModel | None:
        """This rank's part of the model that runs; None where nothing of it is in memory."""

    @property
    def head(self) -> Tensor | None:
        """Vocabulary shard [V/tp, h] that makes distributions of `HiddenTargets`, else None.

        It is there on the last pipeline stage only.
        """

    def annotate(self, trajectories: Sequence[Trajectory]) -> None:
        """Set `targets` of each trajectory; all ranks call this."""
