"""The frozen AR teacher, on the same ranks as the student; runs once over each rollout batch.

It hands hidden states [L, h] of each trajectory to the student's updates, never logits.
"""

from collections.abc import Sequence

import torch

from megatron_dlm.config import Config
from megatron_dlm.models.forward import clean_row, forward_hidden
from megatron_dlm.models.model import DiffusionGPTModel, head_weight
from megatron_dlm.models.row_packing import RowPacking
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.types.teacher_targets import HiddenTargets
from megatron_dlm.types.trajectory import Trajectory

ROWS_PER_STAGE = 8
"""Rows in flight for each pipeline stage: enough that filling and draining it costs little."""


class FrozenTeacher:
    """Annotates trajectories with the teacher's hidden states.

    Args:
        model: This rank's part, frozen and in evaluation mode (`build_frozen_model`).
        packing: How trajectories are laid into the rows of its forwards.
        rows_at_once: Rows that are in flight, in the stages of a pipeline.
        stop: Checked before these for a request to stop; None: never.
    """

    def __init__(
        self,
        model: DiffusionGPTModel,
        packing: RowPacking,
        rows_at_once: int = 1,
        stop: StopAgreement | None = None,
    ) -> None:
        self.model = model
        self._packing = packing
        self._rows_at_once = rows_at_once
        self._stop = stop

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
            StopRequested: On all ranks in step.
        """
        if any(len(trajectory.prompt_ids) == 0 for trajectory in trajectories):
            raise ValueError("a trajectory without a prompt has no first-token target")
        texts = [trajectory.token_ids[:-1] for trajectory in trajectories]
        rows = self._packing.rows([len(text) for text in texts])
        rows += [[]] * (self._packing.agreed(len(rows)) - len(rows))
        for start in range(0, len(rows), self._rows_at_once):
            if self._stop is not None:
                self._stop.check()
            chunk = slice(start, start + self._rows_at_once)
            hidden_rows = forward_hidden(
                self.model, [clean_row([texts[i] for i in row], "causal") for row in rows[chunk]]
            )
            if hidden_rows is not None:
                groups = [[trajectories[i] for i in row] for row in rows[chunk]]
                _set_targets(groups, hidden_rows)


def frozen_teacher(
    model: DiffusionGPTModel, config: Config, stop: StopAgreement | None
) -> FrozenTeacher:
    """The teacher of a run: rows packed as those of training, enough to fill the pipeline."""
    stages = config.parallel.pipeline_model_parallel_size
    rows_at_once = 1 if stages == 1 else ROWS_PER_STAGE * stages
    return FrozenTeacher(model, RowPacking.of(config), rows_at_once, stop)


def _set_targets(
    groups: Sequence[Sequence[Trajectory]], hidden_rows: Sequence[torch.Tensor]
) -> None:
    """Cut the hidden states [S, h] of rows into those that predict the responses."""
    for group, hidden in zip(groups, hidden_rows, strict=True):
        start = 0
        for trajectory in group:
            length = len(trajectory.token_ids) - 1
            first = start + len(trajectory.prompt_ids) - 1
            own = hidden[first : start + length].clone()
            trajectory.targets = HiddenTargets(own)
            start += length
