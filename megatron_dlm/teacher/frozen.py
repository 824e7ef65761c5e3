"""The frozen AR teacher, on the same ranks as the student; runs once over each rollout batch.

It hands hidden states [L, h] of each trajectory to the student's updates, never logits. Under
context parallelism its rows are shared as those of updates are, and so are the hidden states.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_dlm.activity import ACTIVITY
from megatron_dlm.config import Config
from megatron_dlm.models.context_parallel import share_of_row, token_ranks
from megatron_dlm.models.forward import Row, clean_row, forward_hidden, row_multiple
from megatron_dlm.models.model import StageModel, head_weight
from megatron_dlm.models.row_packing import RowPacking
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.types.teacher_targets import HiddenTargets, PlacedTargets
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
        groups: Process groups, of which the context-parallel one shares each row; None: each
            replica has trajectories of its own.

    Attributes:
        hidden: [slots, h], on the last stage the hidden states that this rank holds of the
            trajectories that were annotated last; None where each has its own.
    """

    hidden: torch.Tensor | None = None

    def __init__(
        self,
        model: StageModel,
        packing: RowPacking,
        rows_at_once: int = 1,
        stop: StopAgreement | None = None,
        groups: ParallelGroups | None = None,
    ) -> None:
        self.model = model
        self._groups = groups or ParallelGroups()
        self._kept: list[torch.Tensor] = []
        self._used: list[int] = []
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
        self._kept, self._used, self.hidden = [], [0] * self._groups.cp_size, None
        with ACTIVITY.working("rows", len(rows)) as work:
            for start in range(0, len(rows), self._rows_at_once):
                if self._stop is not None:
                    if self._groups.cp is None:
                        self._stop.check()
                    else:  # ranks that share rows leave together, and all have as many rows
                        self._stop.check_all()
                chunk = rows[start : start + self._rows_at_once]
                clean = [clean_row([texts[i] for i in row], "causal") for row in chunk]
                of_rows = [[trajectories[i] for i in row] for row in chunk]
                if self._groups.cp is None:
                    self._set_targets(of_rows, clean)
                else:
                    self._share_targets(of_rows, clean)
                work.done += len(chunk)
        if self._kept:
            self.hidden, self._kept = torch.cat(self._kept), []

    def _set_targets(self, groups: Sequence[Sequence[Trajectory]], rows: Sequence[Row]) -> None:
        """Run rows of trajectories, and give each what predicts its response."""
        reading = [
            replace(row, read=torch.cat([torch.arange(0), *map(_range, _predicting(group))]))
            for group, row in zip(groups, rows, strict=True)
        ]
        hidden_rows = forward_hidden(self.model, reading)
        for group, hidden in zip(groups, hidden_rows or (), strict=hidden_rows is not None):
            own = hidden.split([len(trajectory.response_ids) for trajectory in group])
            for trajectory, targets in zip(group, own, strict=True):
                trajectory.targets = HiddenTargets(targets)

    def _share_targets(self, groups: Sequence[Sequence[Trajectory]], rows: Sequence[Row]) -> None:
        """As `_set_targets`, of rows that the ranks of the context-parallel group share."""
        rank, ranks = self._groups.cp_rank, self._groups.cp_size
        holders = [token_ranks(row.attention, ranks) for row in rows]
        shares = [
            share_of_row(row, holder, rank, ranks, row_multiple(self.model))
            for row, holder in zip(rows, holders, strict=True)
        ]
        hidden_rows = forward_hidden(self.model, [share.row for share in shares])
        if hidden_rows is None:
            return
        for group, holder, share, hidden in zip(groups, holders, shares, hidden_rows, strict=True):
            for trajectory, where in zip(group, _predicting(group), strict=True):
                of_rank = holder[where]
                own = share.place[where][of_rank == rank]
                self._kept.append(hidden[own.to(hidden.device)])
                slot = torch.empty_like(of_rank)
                for other in range(ranks):
                    there = of_rank == other
                    count = int(there.sum())
                    slot[there] = torch.arange(self._used[other], self._used[other] + count)
                    self._used[other] += count
                trajectory.targets = PlacedTargets(of_rank, slot)


def frozen_teacher(
    model: StageModel,
    config: Config,
    stop: StopAgreement | None,
    groups: ParallelGroups | None = None,
) -> FrozenTeacher:
    """The teacher of a run: rows packed as those of training, enough to fill the pipeline."""
    return FrozenTeacher(model, RowPacking.of(config), rows_in_flight(config), stop, groups)


def rows_in_flight(config: Config) -> int:
    """Rows of a teacher's forward-only schedule: enough to fill its pipeline."""
    stages = config.parallel.pipeline_model_parallel_size
    return 1 if stages == 1 else ROWS_PER_STAGE * stages


def _predicting(group: Sequence[Trajectory]) -> list[slice]:
    """The tokens of a row of trajectories that predict the response of each."""
    found, start = [], 0
    for trajectory in group:
        length = len(trajectory.token_ids) - 1
        found.append(slice(start + len(trajectory.prompt_ids) - 1, start + length))
        start += length
    return found


def _range(where: slice) -> torch.Tensor:
    return torch.arange(where.start, where.stop)
