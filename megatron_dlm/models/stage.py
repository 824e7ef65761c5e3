"""This rank's stage of a pipeline, for rows that follow each other without waiting for an answer.

S: tokens of a row; h: hidden size; tp: ranks that a row is split over under sequence parallelism.
"""

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.idle import NEIGHBOURS
from megatron_dlm.models.forward import Row, forward_row, padded_rows
from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.parallel import ParallelGroups


class Stage:
    """Takes rows from the stage before, runs its own layers, and hands them to the next stage.

    What is sent travels while this stage computes the next row. All stages run the same rows in the
    same order, so that neither shapes nor names of rows have to travel.

    Args:
        model: This rank's part of a `DiffusionGPTModel` in evaluation mode.
        groups: Process groups.
        rows_in_flight: Rows of which what was sent may not have arrived yet.
    """

    def __init__(
        self, model: DiffusionGPTModel, groups: ParallelGroups, rows_in_flight: int = 1
    ) -> None:
        self._model = model
        self._pp = groups.pp
        self._rows_in_flight = rows_in_flight
        self._sent: deque[tuple[Any, Tensor]] = deque()

    @torch.no_grad()
    def run(self, row: Row) -> Tensor | None:
        """Run one row through the layers of this stage.

        Args:
            row: Padded here as sequence parallelism and the attention kernel need it.

        Returns:
            On the last stage the row's hidden states [S, h], without the padding; else None.
        """
        (padded,), equally_long = padded_rows(self._model, [row])
        if self._pp is not None and not self._model.pre_process:
            self._model.set_input_tensor(self._received(len(padded.token_ids)))
        output = forward_row(self._model, padded, equally_long)
        if not self._model.post_process:
            self._send(output)
            return None
        if self._model.config.sequence_parallel:
            output = gather_from_sequence_parallel_region(output)
        return output[: len(row.token_ids), 0]

    def settle(self) -> None:
        """Wait until all that was sent has arrived."""
        while self._sent:
            self._sent.popleft()[0].wait()

    def _received(self, length: int) -> Tensor:
        """What the stage before made of a row of some length, [S / tp, 1, h]."""
        assert self._pp is not None
        config = self._model.config
        parts = config.tensor_model_parallel_size if config.sequence_parallel else 1
        hidden = torch.empty(
            (length // parts, 1, config.hidden_size),
            dtype=config.pipeline_dtype,
            device=platform.device(),
        )
        with NEIGHBOURS.waiting():
            _wait(dist.irecv(hidden, group=self._pp, group_src=self._pp.rank() - 1))
        return hidden

    def _send(self, hidden: Tensor) -> None:
        assert self._pp is not None
        while len(self._sent) >= self._rows_in_flight:
            _wait(self._sent.popleft()[0])
        work = dist.isend(hidden, group=self._pp, group_dst=self._pp.rank() + 1)
        self._sent.append((work, hidden))


def _wait(work: Any) -> None:
    """Wait for an operation; None: this rank takes no part in it."""
    if work is not None:
        work.wait()
