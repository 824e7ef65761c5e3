"""OPDLM: on-policy distillation of an AR model into a block-diffusion model (paper section 4).

The student is trained at the states its own rollouts visit; at each masked position the target is
the frozen AR teacher's distribution given the clean prefix, p(. | x_0^{<i}).
"""

import torch
from torch import Tensor

from megatron_dlm.config.schema import Config
from megatron_dlm.distillation.divergence_spec import DivergenceSpec
from megatron_dlm.distillation.vocab_parallel_divergence import (
    vocab_parallel_divergence,
)
from megatron_dlm.objectives.base import Document, Objective
from megatron_dlm.objectives.block_diffusion import block_diffusion_document, supervised_positions
from megatron_dlm.objectives.state_selection import SELECTORS, unmask_steps
from megatron_dlm.rollout.trajectory import Trajectory


class OPDLM(Objective):
    """Divergence between teacher and student at the MASKs of visited states."""

    on_policy = True
    uses_teacher = True

    def __init__(self, config: Config, mask_token_id: int, vocab_size: int) -> None:
        super().__init__(config, mask_token_id, vocab_size)
        options = config.distillation
        self.select = SELECTORS[config.objective.state_selection]
        self.divergence = DivergenceSpec.parse(
            options.divergence,
            jsd_beta=options.jsd_beta,
            top_k=options.divergence_top_k,
            tail=options.divergence_tail,
            chunk_size=options.divergence_chunk_size,
        )

    def document(self, trajectory: Trajectory, generator: torch.Generator) -> Document:
        """One state per block, one of the whole trajectory, or all (`--state-selection`)."""
        block_size = self.config.model.block_size
        supervised = supervised_positions(trajectory, self.config.objective.supervise_eos)
        steps = unmask_steps(trajectory)
        block = torch.arange(len(steps)) // block_size
        last_step = torch.zeros(int(block[-1]) + 1, dtype=torch.int64)
        last_step.scatter_reduce_(0, block, steps * supervised, "amax")
        if int(last_step.sum()) == 0:  # a response of nothing but an unsupervised EOS
            states = [torch.zeros_like(supervised)]
        else:
            states = self.select(steps, block, last_step, generator)
        return block_diffusion_document(
            trajectory,
            states,
            supervised,
            block_size=block_size,
            mask_token_id=self.mask_token_id,
        )

    def loss(
        self,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        weights: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        tp_group: torch.distributed.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        """Divergence of the student from the teacher; see `Objective.loss`."""
        assert teacher_hidden is not None
        assert teacher_head is not None
        return vocab_parallel_divergence(
            hidden,
            head,
            teacher_hidden,
            teacher_head,
            weights,
            self.divergence,
            self.vocab_size,
            tp_group,
        )
