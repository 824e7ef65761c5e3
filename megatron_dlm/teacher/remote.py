"""A teacher that other processes hold: servers, or ranks of the job that have no student.

Of each replica of the student one rank asks; the ranks that need the targets get them from it.
Texts are sent ahead as soon as a rollout has finished them, so that the teacher works meanwhile.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.activity import ACTIVITY
from megatron_dlm.errors import UserError
from megatron_dlm.models.architecture import Architecture
from megatron_dlm.models.model_provider import padded_vocab_size
from megatron_dlm.parallel import ParallelGroups, errors_on_all_ranks
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.teacher.client import POLL_SECONDS, Asked, TeacherClient
from megatron_dlm.teacher.wire import TeacherText
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

    Attributes:
        model: None.
    """

    model: None = None

    def __init__(
        self,
        client: TeacherClient,
        k: int,
        sizes: Architecture,
        groups: ParallelGroups,
        stop: StopAgreement | None = None,
    ) -> None:
        self._client, self._k, self._sizes = client, k, sizes
        self._groups, self._stop = groups, stop
        is_first = groups.tp is None or groups.tp.rank() == 0
        self._asks = groups.is_last_stage and groups.cp_rank == 0 and is_first

    @cached_property
    def head(self) -> Tensor | None:
        """The output layer's vocabulary shard [V/tp, h] on the last stage, for hidden states.

        None with the most likely tokens: these are probabilities already.

        Raises:
            UserError: No server gave it.
        """
        if self._k or not self._groups.is_last_stage:
            return None
        tp = self._groups.tp
        rank, ranks = (0, 1) if tp is None else (tp.rank(), tp.size())
        rows = padded_vocab_size(self._sizes.vocab_size, ranks) // ranks
        first = min(rank * rows, self._sizes.vocab_size)
        last = min(first + rows, self._sizes.vocab_size)
        width = self._sizes.hidden_size
        if first == last:  # nothing but padding, which has no probability
            own = self._client.head(0, 1, width)[:0]
        else:
            own = self._client.head(first, last, width)
        padding = own.new_zeros(rows - len(own), width)
        return torch.cat((own, padding)).to(platform.device())

    def send_ahead(self, trajectory: Trajectory) -> None:
        """Begin with a finished trajectory, which is annotated later; any rank may call this."""
        if self._groups.is_first_of_replica and len(trajectory.response_ids):
            self._client.send_ahead(TeacherText.of(trajectory), self._k)

    def annotate(self, trajectories: Sequence[Trajectory]) -> None:
        """Set `targets` of each trajectory, on the last pipeline stage; all ranks call this.

        Raises:
            UserError: On all ranks: the teacher did not answer one of them.
            StopRequested: On all ranks.
        """
        texts = [TeacherText.of(trajectory) for trajectory in trajectories]
        counts = [len(text) for text in texts]
        with errors_on_all_ranks():
            _ = self.head  # the first time it is fetched
        asks = texts if self._asks else []
        asked = self._client.begin([text for text in asks if len(text)], self._k)
        try:
            self._await(asked)
            with errors_on_all_ranks():
                if isinstance(asked.error, UserError):
                    raise asked.error
        finally:
            asked.cancel()
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

    def _await(self, asked: Asked) -> None:
        """Wait for all ranks' answers in step: a teacher may take longer than a collective waits.

        Raises:
            StopRequested: On all ranks.
        """
        waits, has_failed = True, False
        while waits and not has_failed:
            asked.wait(POLL_SECONDS)
            ACTIVITY.step()  # a server that hangs has a timeout of its own
            waits, has_failed = not asked.has_ended, asked.error is not None
            if self._stop is not None:
                waits, has_failed = self._stop.agree(waits, has_failed)

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
