"""The most likely tokens after texts, or hidden states, by a teacher whose ranks run in step.

Ranks in step hold one replica of the teacher, or several that share experts. All of them get the
same texts; each replica takes its share of the rows, and the first rank gets all targets.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm.activity import ACTIVITY
from megatron_dlm.config import Config
from megatron_dlm.distillation.vocab_parallel_top_k import vocab_parallel_top_k
from megatron_dlm.models.forward import clean_row, forward_hidden
from megatron_dlm.models.model import StageModel, head_weight
from megatron_dlm.models.row_packing import RowPacking
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.teacher.frozen import rows_in_flight
from megatron_dlm.teacher.wire import TeacherText
from megatron_dlm.types.teacher_targets import HiddenTargets, TeacherTargets

T = TypeVar("T")


class TextTeacher:
    """Computes targets of texts; every method is called by all ranks in step.

    Args:
        model: This rank's part, frozen and in evaluation mode.
        config: That the model was built by: layout, rows, chunks of the output layer.
        groups: Process groups of the model.
        in_step: The ranks in step, over gloo; None where this rank is alone.
    """

    def __init__(
        self,
        model: StageModel,
        config: Config,
        groups: ParallelGroups,
        in_step: dist.ProcessGroup | None,
    ) -> None:
        self._model, self._groups, self.in_step = model, groups, in_step
        self._packing = RowPacking.of(config)
        self._chunk = config.distillation.divergence_chunk_size
        self._rows_at_once = rows_in_flight(config)
        replicas = [groups.replica]
        if in_step is not None:
            replicas = [0] * in_step.size()
            dist.all_gather_object(replicas, groups.replica, group=in_step)
        of_set = sorted(set(replicas))
        self._replica, self._replicas = of_set.index(groups.replica), len(of_set)

    @property
    def is_first(self) -> bool:
        """Whether this is the first of the ranks in step, which has the results."""
        return self.in_step is None or self.in_step.rank() == 0

    def targets(self, texts: Sequence[TeacherText], k: int) -> list[TeacherTargets]:
        """The targets of texts, on the CPU; empty on all ranks but the first.

        Args:
            texts: The same on all ranks.
            k: Tokens of a distribution, fewer than there are; 0: hidden states.
        """
        rows = self._packing.rows([len(text.token_ids) for text in texts])
        rounds = -(-len(rows) // self._replicas)
        own = rows[self._replica :: self._replicas]
        own += [[]] * (rounds - len(own))  # ranks that share experts run equally many rows
        found: dict[int, TeacherTargets] = {}
        for start in range(0, rounds, self._rows_at_once):
            chunk = own[start : start + self._rows_at_once]
            clean = [clean_row([texts[i].token_ids for i in row], "causal") for row in chunk]
            hidden_rows = forward_hidden(self._model, clean)
            for row, hidden in zip(chunk, hidden_rows or [], strict=hidden_rows is not None):
                if row:
                    found |= self._of_row(row, [texts[i] for i in row], hidden, k)
            ACTIVITY.step()
        return self._gathered(found, len(texts))

    def _of_row(
        self, indices: Sequence[int], texts: Sequence[TeacherText], hidden: Tensor, k: int
    ) -> dict[int, TeacherTargets]:
        """The targets of the texts of a row of hidden states [S, h]."""
        wanted, start = [], 0
        for text in texts:
            wanted.append(hidden[start + text.first : start + len(text.token_ids)])
            start += len(text.token_ids)
        targets: TeacherTargets = HiddenTargets(torch.cat(wanted))
        if k:
            targets, _ = vocab_parallel_top_k(
                torch.cat(wanted),
                head_weight(self._model),
                k,
                self._model.num_tokens,
                self._groups.tp,
                self._chunk,
            )
        targets = targets.to(torch.device("cpu"))
        found, start = {}, 0
        for index, text in zip(indices, texts, strict=True):
            found[index] = targets[slice(start, start + len(text))]
            start += len(text)
        return found

    def _gathered(self, found: dict[int, TeacherTargets], number: int) -> list[TeacherTargets]:
        """All targets of the ranks in step, in order, on the first of them."""
        speaks = self._groups.tp is None or self._groups.tp.rank() == 0
        parts = self._on_first(found if speaks else {})
        if not self.is_first:
            return []
        whole = {index: targets for part in parts for index, targets in part.items()}
        return [whole[index] for index in range(number)]

    def head(self) -> Tensor | None:
        """The whole output layer [V, h], on the CPU of the first rank; None on the others."""
        own = None
        if self._replica == 0 and self._model.post_process:
            own = head_weight(self._model).detach().cpu()
        shards = [shard for shard in self._on_first(own) if shard is not None]  # by their ranks
        return torch.cat(shards)[: self._model.num_tokens] if self.is_first else None

    def _on_first(self, own: T) -> list[T]:
        """What all ranks in step have, on the first of them; empty on the others."""
        if self.in_step is None:
            return [own]
        gathered: list[Any] = [None] * self.in_step.size()
        first = dist.get_process_group_ranks(self.in_step)[0]
        dist.gather_object(own, gathered if self.is_first else None, first, self.in_step)
        return gathered if self.is_first else []
