"""A teacher that other processes hold: servers, or ranks of the job that have no student.

Of each replica of the student one rank asks; the ranks that need the targets get them from it.
Texts are sent ahead as soon as a rollout has finished them, so that the teacher works meanwhile.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_dlm import platform
from megatron_dlm.parallel import ParallelGroups, errors_on_all_ranks
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.stop_request import StopRequested
from megatron_dlm.teacher.client import TeacherClient
from megatron_dlm.teacher.wire import TeacherText
from megatron_dlm.types.teacher_targets import TopKTargets
from megatron_dlm.types.trajectory import Trajectory


class RemoteTeacher:
    """Annotates trajectories with the most likely tokens of a teacher that lies elsewhere.

    Args:
        client: Reaches it.
        k: Tokens of a distribution.
        groups: Process groups of the student.
        stop: Whether the run is to stop is looked at while answers are waited for; None: never.

    Attributes:
        model: None.
        head: None: targets are probabilities already.
    """

    model: None = None
    head: None = None

    def __init__(
        self,
        client: TeacherClient,
        k: int,
        groups: ParallelGroups,
        stop: StopAgreement | None = None,
    ) -> None:
        self._client, self._k, self._groups, self._stop = client, k, groups, stop
        is_first = groups.tp is None or groups.tp.rank() == 0
        self._asks = groups.is_last_stage and groups.cp_rank == 0 and is_first

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
        found: TopKTargets | None = None
        stop_code = 0
        with errors_on_all_ranks():
            if self._asks:
                try:
                    found = self._asked(texts)
                except StopRequested as stop:
                    stop_code = stop.code
        if self._stop is not None:
            with self._stop.settled():
                if stop_code:
                    raise StopRequested(stop_code)
        if not self._groups.is_last_stage:
            return
        start, targets = 0, self._shared(found, sum(counts))
        for trajectory, count in zip(trajectories, counts, strict=True):
            trajectory.targets = targets[slice(start, start + count)]
            start += count

    def close(self) -> None:
        """Send nothing more."""
        self._client.close()

    def _asked(self, texts: Sequence[TeacherText]) -> TopKTargets:
        """The targets of texts, end to end."""
        asked = [text for text in texts if len(text)]
        answers = self._client.top_k(asked, self._k, self._check)
        none = TopKTargets(
            torch.empty(0, self._k, dtype=torch.int32), torch.empty(0, self._k), torch.empty(0)
        )
        return TopKTargets.cat([none, *answers])

    def _check(self) -> None:
        if self._stop is not None and (code := self._stop.requested):
            raise StopRequested(code)

    def _shared(self, found: TopKTargets | None, predictions: int) -> TopKTargets:
        """What the rank that asked has found, on all ranks of the last stage."""
        device, k = platform.device(), self._k
        if found is None:
            found = TopKTargets(
                torch.empty(predictions, k, dtype=torch.int32),
                torch.empty(predictions, k),
                torch.empty(predictions),
            )
        groups = [group for group in (self._groups.cp, self._groups.tp) if group is not None]
        if not groups:
            return found
        found = found.to(device)
        assert found.log_rest is not None
        for group in groups:
            first = dist.get_process_group_ranks(group)[0]
            for tensor in (found.token_ids, found.log_probs, found.log_rest):
                dist.broadcast(tensor, src=first, group=group)
        return found.to(torch.device("cpu"))
