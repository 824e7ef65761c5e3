"""A teacher that other processes hold: servers, or ranks of the job that have no student.

Of each replica of the student one rank asks; the ranks that need the targets get them from it.
Texts are sent ahead as soon as a rollout has finished them, so that the teacher works meanwhile.
Where several texts share a row, they are sent when all are known, in the rows that a teacher in
memory would have: how its results are rounded depends on these.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.models.architecture import Architecture
from megatron_dlm.models.model_provider import padded_vocab_size
from megatron_dlm.models.row_packing import RowPacking
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.teacher.client import Asked, TeacherClient
from megatron_dlm.teacher.waiting import wait_for
from megatron_dlm.teacher.wire import TeacherRow, TeacherText
from megatron_dlm.types.teacher_targets import HiddenTargets, TeacherTargets, TopKTargets
from megatron_dlm.types.trajectory import Trajectory


class RemoteTeacher:
    """Annotates trajectories with the targets of a teacher that lies elsewhere.

    Args:
        client: Reaches it.
        k: Tokens of a distribution; 0 for hidden states, of which the student's ranks hold the
            teacher's output layer.
        sizes: Of the teacher.
        groups: Process groups of the student.
        stop: Whether the run is to stop is looked at while answers are waited for; None: never.
        packing: How the run lays texts into rows; a budget of tokens is the server's matter.

    Attributes:
        model: None.
        head: For hidden states, after the first call of `annotate`: the output layer's vocabulary
            shard [V/tp, h] on the last stage. None with the most likely tokens: these are
            probabilities already.
    """

    model: None = None
    head: Tensor | None

    def __init__(
        self,
        client: TeacherClient,
        k: int,
        sizes: Architecture,
        groups: ParallelGroups,
        stop: StopAgreement | None = None,
        packing: RowPacking = RowPacking(),  # noqa: B008 - immutable
    ) -> None:
        self._client, self._k, self._sizes = client, k, sizes
        self._groups, self._stop = groups, stop
        self.head, self._has_head = None, False
        self._packing = RowPacking() if packing.max_tokens is not None else packing
        is_first = groups.tp is None or groups.tp.rank() == 0
        self._asks = groups.is_last_stage and groups.cp_rank == 0 and is_first

    def _fetch_head(self) -> None:
        """Fetch `head`, the first time; all ranks call this.

        Raises:
            UserError: On all ranks: no server gave it.
            StopRequested: On all ranks.
        """
        if self._k or self._has_head:
            return
        asked: Asked[Tensor] = Asked({})
        tp = self._groups.tp
        rank, ranks = (0, 1) if tp is None else (tp.rank(), tp.size())
        rows = padded_vocab_size(self._sizes.vocab_size, ranks) // ranks
        first = min(rank * rows, self._sizes.vocab_size)
        last = min(first + rows, self._sizes.vocab_size)
        width = self._sizes.hidden_size
        if self._groups.is_last_stage:
            # A shard of nothing but padding has a row for its type.
            asked = self._client.begin_head(*((0, 1) if first == last else (first, last)), width)
        wait_for(asked, self._stop)
        self._has_head = True
        for found in asked.result():
            own = found[: last - first]
            padding = own.new_zeros(rows - len(own), width)  # which has no probability
            self.head = torch.cat((own, padding)).to(platform.device())

    def send_ahead(self, trajectory: Trajectory) -> None:
        """Begin with a finished trajectory, which is annotated later; any rank may call this."""
        has_row = self._packing.texts == 1 and len(trajectory.response_ids) > 0
        if self._groups.is_first_of_replica and has_row:
            self._client.send_ahead(TeacherRow((TeacherText.of(trajectory),)), self._k)

    def annotate(self, trajectories: Sequence[Trajectory]) -> None:
        """Set `targets` of each trajectory, on the last pipeline stage; all ranks call this.

        Raises:
            UserError: On all ranks: the teacher did not answer one of them.
            StopRequested: On all ranks.
        """
        texts = [TeacherText.of(trajectory) for trajectory in trajectories]
        counts = [len(text) for text in texts]
        self._fetch_head()
        rows = []
        for indices in self._packing.rows([len(text.token_ids) for text in texts]):
            row = tuple(texts[index] for index in indices if len(texts[index]))
            if row and self._asks:
                rows.append(TeacherRow(row))
        asked = self._client.begin(rows, self._k)
        wait_for(asked, self._stop)
        found = TeacherTargets.cat([self._empty(0), *asked.result()]) if self._asks else None
        if not self._groups.is_last_stage:
            return
        start, targets = 0, self._shared(found, sum(counts))
        for trajectory, count in zip(trajectories, counts, strict=True):
            trajectory.targets = targets[slice(start, start + count)]
            start += count

    def close(self) -> None:
        """Send nothing more."""
        self._client.close()

    def _empty(self, predictions: int) -> TeacherTargets:
        """Targets without values."""
        if self.head is not None:
            width = self._sizes.hidden_size
            return HiddenTargets(torch.empty(predictions, width, dtype=self.head.dtype))
        return TopKTargets(
            torch.empty(predictions, self._k, dtype=torch.int32),
            torch.empty(predictions, self._k),
            torch.empty(predictions),
        )

    def _shared(self, found: TeacherTargets | None, predictions: int) -> TeacherTargets:
        """What the rank that asked has found, on all ranks of the last stage."""
        if found is None:
            found = self._empty(predictions)
        groups = [group for group in (self._groups.cp, self._groups.tp) if group is not None]
        if not groups:
            return found
        found = found.to(platform.device())
        for group in groups:
            first = dist.get_process_group_ranks(group)[0]
            for tensor in vars(found).values():
                dist.broadcast(tensor, src=first, group=group)
        return found.to(torch.device("cpu"))
