"""Distillation of an AR teacher into a block-diffusion student (OPDLM section 4).

At each masked position the target is the frozen teacher's distribution given the clean prefix,
p(. | x_0^{<i}). Objectives differ in where x_0 and its states come from.
"""

from functools import cached_property

import torch
from torch import Tensor

from megatron_dlm.distillation.vocab_parallel_divergence import (
    vocab_parallel_divergence,
    vocab_parallel_top_k_divergence,
)
from megatron_dlm.objectives.base import LossInputs
from megatron_dlm.objectives.block_diffusion import BlockDiffusionObjective
from megatron_dlm.types.divergence_spec import DivergenceSpec
from megatron_dlm.types.teacher_targets import HiddenTargets, TopKTargets
from megatron_dlm.types.trajectory import Trajectory


class DistillationObjective(BlockDiffusionObjective):
    """Divergence between teacher and student at the MASKs of random states, all weights 1.

    `off_policy` (states of responses that the teacher wrote once) and `opdlm_off` (of the student's
    rollouts, OPDLM table 4) are this objective with different sources of responses.
    """

    @cached_property
    def divergence(self) -> DivergenceSpec:
        """The divergence that the options name."""
        options = self.config.distillation
        return DivergenceSpec.parse(
            options.divergence,
            jsd_beta=options.jsd_beta,
            top_k=options.divergence_top_k,
            tail=options.divergence_tail,
            chunk_size=options.divergence_chunk_size,
        )

    def states(
        self, trajectory: Trajectory, supervised: Tensor, generator: torch.Generator
    ) -> tuple[list[Tensor], Tensor | None]:
        """One random state; see `BlockDiffusionObjective.states`."""
        masked, _ = self.random_state(trajectory, supervised, generator)
        return [masked], None

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        """Divergence of the student from the teacher; see `Objective.loss`."""
        if isinstance(inputs.targets, TopKTargets):
            return vocab_parallel_top_k_divergence(
                inputs.hidden,
                inputs.head,
                inputs.targets,
                inputs.weights,
                self.divergence,
                self.vocab_size,
                inputs.tp_group,
            )
        assert isinstance(inputs.targets, HiddenTargets)
        assert inputs.teacher_head is not None
        return vocab_parallel_divergence(
            inputs.hidden,
            inputs.head,
            inputs.targets.hidden,
            inputs.teacher_head,
            inputs.weights,
            self.divergence,
            self.vocab_size,
            inputs.tp_group,
        )
