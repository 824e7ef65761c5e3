"""OPDLM: on-policy distillation at the states that the student's own rollouts visit (section 4)."""

import torch
from torch import Tensor

from megatron_dlm.objectives.distillation import DistillationObjective
from megatron_dlm.objectives.state_selection import SELECTORS, unmask_steps
from megatron_dlm.types.trajectory import Trajectory


class OPDLM(DistillationObjective):
    """Distillation at visited states: one per block, one of the trajectory, or all.

    A response of the teacher (`--teacher-response-fraction`) has no visited states; it is trained
    at a random one.
    """

    def states(
        self, trajectory: Trajectory, supervised: Tensor, generator: torch.Generator
    ) -> tuple[list[Tensor], Tensor | None]:
        """The states that `--state-selection` names; see `BlockDiffusionObjective.states`."""
        if not trajectory.is_rollout:
            return super().states(trajectory, supervised, generator)
        selection = self.config.state_selection
        assert selection is not None
        steps = unmask_steps(trajectory)
        block = torch.arange(len(steps)) // self.config.model.block_size
        last_step = torch.zeros(int(block[-1]) + 1, dtype=torch.int64)
        last_step.scatter_reduce_(0, block, steps * supervised, "amax")
        return SELECTORS[selection](steps, block, last_step, generator), None
