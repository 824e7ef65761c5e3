"""The frozen AR teacher, on the same ranks as the student; runs once over each rollout batch.

It hands hidden states [L, h] of each trajectory to the student's updates, never logits.
"""

from collections.abc import Sequence

import torch

from megatron_dlm.models.attention_layout import clean_layout
from megatron_dlm.models.forward import Row, forward_hidden
from megatron_dlm.models.model import DiffusionGPTModel, head_weight
from megatron_dlm.types.teacher_targets import HiddenTargets
from megatron_dlm.types.trajectory import Trajectory


class FrozenTeacher:
    """Annotates trajectories with the teacher's hidden states.

    Args:
        model: This rank's part, frozen and in evaluation mode (`build_frozen_model`).
        rows_of: Trajectories per packed row of a forward.
    """

    def __init__(self, model: DiffusionGPTModel, rows_of: int) -> None:
        self.model = model
        self._rows_of = rows_of

    @property
    def head(self) -> torch.Tensor | None:
        """The output layer's vocabulary shard [V/tp, h] on the last pipeline stage, else None."""
        return head_weight(self.model) if self.model.post_process else None

    def annotate(self, trajectories: Sequence[Trajectory]) -> None:
        """Set `targets` of each trajectory, on the last pipeline stage.

        An AR model's hidden state at i - 1 predicts token i, so a response of L tokens after P
        prompt tokens takes positions P - 1 .. P + L - 2 of the causal forward over x_0.

        Raises:
            ValueError: A prompt is empty: nothing predicts the first token.
        """
        groups = [
            trajectories[start : start + self._rows_of]
            for start in range(0, len(trajectories), self._rows_of)
        ]
        rows = []
        for group in groups:
            if any(len(trajectory.prompt_ids) == 0 for trajectory in group):
                raise ValueError("a trajectory without a prompt has no first-token target")
            tokens = [trajectory.token_ids[:-1] for trajectory in group]
            layout = clean_layout([len(ids) for ids in tokens], "causal", block_size=1)
            rows.append(Row(torch.cat(tokens), layout[3].long(), layout))
        hidden_rows = forward_hidden(self.model, rows)
        if hidden_rows is None:
            return
        for group, hidden in zip(groups, hidden_rows, strict=True):
            start = 0
            for trajectory in group:
                length = len(trajectory.token_ids) - 1
                first = start + len(trajectory.prompt_ids) - 1
                own = hidden[first : start + length].clone()
                trajectory.targets = HiddenTargets(own)
                start += length
