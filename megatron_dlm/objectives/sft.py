"""Supervised fine-tuning by block diffusion (BD3-LM, Arriola et al. 2025)."""

import torch
from torch import Tensor

from megatron_dlm.config.objective_traits import OBJECTIVE_TRAITS
from megatron_dlm.distillation.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy
from megatron_dlm.objectives.base import LossInputs
from megatron_dlm.objectives.block_diffusion import BlockDiffusionObjective
from megatron_dlm.rollout.trajectory import Trajectory


class SFT(BlockDiffusionObjective):
    """Cross entropy w(t) * -log q(x_0^i | x_t, clean prefix) at the MASKs of a random state.

    The student is not shifted: position i predicts token i.
    """

    traits = OBJECTIVE_TRAITS["sft"]

    def states(
        self, trajectory: Trajectory, supervised: Tensor, generator: torch.Generator
    ) -> tuple[list[Tensor], Tensor | None]:
        """One random state, weighted by 1/t or 1; see `BlockDiffusionObjective.states`."""
        masked, t = self.random_state(trajectory, supervised, generator)
        weighted = self.config.objective.loss_weighting == "inverse_t"
        return [masked], t.reciprocal().float() if weighted else None

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        """Cross entropy; see `Objective.loss`."""
        return vocab_parallel_cross_entropy(
            inputs.hidden,
            inputs.head,
            inputs.labels,
            inputs.weights,
            vocab_size=self.vocab_size,
            tp_group=inputs.tp_group,
            chunk_size=self.config.distillation.divergence_chunk_size,
        )
