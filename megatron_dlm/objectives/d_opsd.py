"""d-OPSD: a diffusion model distils from itself, with its own later text shown (arXiv:2606.18195).

The student predicts at a visited state. The teacher is the model that the run started from; it sees
the same state with some tokens of later blocks filled in from the finished response
(`teacher.self_teacher`). Only right responses are trained on. The loss of a state is at the few
masked positions where the teacher is most certain; the sum is divided by the number of states.

C: canvas (`rollout.visited_states`).
"""

from dataclasses import replace

import torch
from torch import Tensor

from megatron_dlm.distillation.clipped_reverse_kl import clipped_reverse_kl
from megatron_dlm.models.attention_layout import CLEAN
from megatron_dlm.objectives.base import LossInputs, Objective
from megatron_dlm.objectives.block_diffusion import block_diffusion_document
from megatron_dlm.rollout.visited_states import (
    VisitedStates,
    final_canvas,
    states_before_last_block,
)
from megatron_dlm.types.document import Document
from megatron_dlm.types.teacher_targets import StateTargets, TopKTargets
from megatron_dlm.types.trajectory import Trajectory


class DOPSD(Objective):
    """Clipped reverse KL from the self-teacher at visited states of right responses."""

    def document(self, trajectory: Trajectory, generator: torch.Generator) -> Document:
        """Lay out the states that have targets, as the rollout saw them; see `Objective.document`.

        Nothing is random here: all states are trained on, at the positions that the teacher chose.
        """
        targets = trajectory.targets
        if targets is None:
            return self._empty_document()
        assert isinstance(targets, StateTargets)
        states = states_before_last_block(trajectory, self.config.model.block_size)
        if self.diffusion_kind.attention_pattern == "full":
            return self._full_document(trajectory, states, targets, self.diffusion_kind.shifted)
        return self._block_causal_document(trajectory, states, targets)

    def expected_size(self, trajectory: Trajectory) -> tuple[int, int, int]:
        """See `Objective.expected_size`; every state is taken for a text as long as the canvas.

        The teacher, which sees it so, costs as much as a full-attention student's forward.
        """
        if not trajectory.correct:
            return 0, 0, 0
        states = len(states_before_last_block(trajectory, self.config.model.block_size))
        length = len(final_canvas(trajectory, self.mask_token_id))
        return states * length, states * length**2, len(trajectory.response_ids)

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        """Clipped reverse KL; see `Objective.loss`."""
        assert isinstance(inputs.targets, TopKTargets)
        return clipped_reverse_kl(
            inputs.hidden,
            inputs.head,
            inputs.targets,
            inputs.weights,
            self.config.self_distillation.divergence_term_limit,
            self.vocab_size,
            inputs.tp_group,
            self.config.distillation.divergence_chunk_size,
        )

    def _empty_document(self) -> Document:
        none = torch.empty(0, dtype=torch.int64)
        k = self.config.self_distillation.teacher_top_k
        return Document(
            token_ids=none,
            block=none,
            stream=none,
            position=none,
            supervised=none,
            labels=none,
            weights=torch.empty(0),
            targets=TopKTargets(
                torch.empty(0, k, dtype=torch.int32), torch.empty(0, k, dtype=torch.float32)
            ),
            loss_count=0,
        )

    def _full_document(
        self, trajectory: Trajectory, states: VisitedStates, targets: StateTargets, shifted: bool
    ) -> Document:
        """Lay out each state as a separate text of C tokens that all see each other."""
        canvas = final_canvas(trajectory, self.mask_token_id)
        num_states, length = len(states), len(canvas)
        token_ids = canvas.expand(num_states, length).masked_fill(states.masked, self.mask_token_id)
        nothing = torch.zeros(num_states * length, dtype=torch.int64)
        return Document(
            token_ids=token_ids.flatten(),
            block=nothing,
            stream=torch.full_like(nothing, CLEAN),
            position=torch.arange(length).repeat(num_states),
            supervised=targets.state * length + targets.position - int(shifted),
            labels=canvas[targets.position],
            weights=torch.ones(len(targets.position)),
            targets=targets.top_k,
            document_ids=torch.arange(num_states).repeat_interleave(length),
            loss_count=num_states,
        )

    def _block_causal_document(
        self, trajectory: Trajectory, states: VisitedStates, targets: StateTargets
    ) -> Document:
        """Lay out a clean stream, and for each step number a noisy stream that all blocks share."""
        canvas = final_canvas(trajectory, self.mask_token_id)
        step = states.step[targets.state]
        num_steps = int(step.max())
        masked = [states.current[states.step == k].any(0) for k in range(1, num_steps + 1)]
        supervised = torch.zeros(num_steps, len(canvas), dtype=torch.bool)
        supervised[step - 1, targets.position] = True
        document = block_diffusion_document(
            replace(trajectory, targets=None),  # those are of states, not of response tokens
            masked,
            supervised,
            block_size=self.config.model.block_size,
            mask_token_id=self.mask_token_id,
        )
        order = (step * len(canvas) + targets.position).argsort()
        return replace(document, targets=targets.top_k[order], loss_count=len(states))
