"""A teacher whose distributions are on disk; its model is not in memory."""

from collections.abc import Callable, Sequence

from megatron_dlm.data.top_k_store import TopKTable
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.types.trajectory import Trajectory


class StoredTeacher:
    """Annotates trajectories with the stored most likely tokens.

    Args:
        table: The stored targets, one entry a record.
        record_index: The record of a global sample index.
        groups: Process groups of the student.

    Attributes:
        model: None.
        head: None: targets are probabilities already.
    """

    model: None = None
    head: None = None

    def __init__(
        self, table: TopKTable, record_index: Callable[[int], int], groups: ParallelGroups
    ) -> None:
        self._table = table
        self._record_index = record_index
        self._groups = groups

    def annotate(self, trajectories: Sequence[Trajectory]) -> None:
        """Set `targets` of each trajectory, on the last pipeline stage."""
        if self._groups.is_last_stage:
            for trajectory in trajectories:
                record = self._record_index(trajectory.sample_index)
                trajectory.targets = self._table[record]
