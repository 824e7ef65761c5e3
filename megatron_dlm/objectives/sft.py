"""Supervised fine-tuning by block diffusion (BD3-LM, Arriola et al. 2025)."""

import torch
from torch import Tensor

from megatron_dlm.objectives.block_diffusion import BlockDiffusionObjective
from megatron_dlm.objectives.cross_entropy import CrossEntropyObjective
from megatron_dlm.types.trajectory import Trajectory


class SFT(CrossEntropyObjective, BlockDiffusionObjective):
    """Cross entropy w(t) * -log q(x_0^i | x_t, clean prefix) at the MASKs of a random state.

    The student is not shifted: position i predicts token i. With w = 1/t the sum is divided by all
    supervised tokens, masked or not, as BD3-LM's bound is; with w = 1 by the MASKs among them.
    """

    def states(
        self, trajectory: Trajectory, supervised: Tensor, generator: torch.Generator
    ) -> tuple[list[Tensor], Tensor | None]:
        """One random state, weighted by 1/t or 1; see `BlockDiffusionObjective.states`."""
        masked, t = self.random_state(trajectory, supervised, generator)
        weighted = self.config.objective.loss_weighting == "inverse_t"
        return [masked], t.reciprocal().float() if weighted else None
