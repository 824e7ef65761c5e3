"""This rank's stage of a pipeline, for rows that follow each other without waiting for an answer.

S: tokens of a row; h: hidden size; tp: ranks that a row is split over under sequence parallelism.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dlm import platform
from megatron_dlm.idle import NEIGHBOURS
from megatron_dlm.models.forward import Row, forward_row, padded_rows, read_of_row
from megatron_dlm.models.model import DiffusionGPTModel, StageModel, chunks_of
from megatron_dlm.parallel import ParallelGroups


@dataclass(frozen=True)
class PaddedRow:
    """A row as the layers take it; see `Stage.prepared`.

    Attributes:
        row: With padding.
        bare: Without it.
        equally_long: Whether the ranks that share experts have rows of the same length.
    """

    row: Row
    bare: Row
    equally_long: bool


class Stage:
    """Takes rows from the stage before, runs its own layers, and hands them to the next stage.

    What is sent travels while this stage computes the next row. All stages run the same rows in the
    same order, so that neither shapes nor names of rows have to travel. Under virtual stages a row
    comes by once for each model chunk, from the last stage to the first in between.

    Args:
        model: This rank's part of a model in evaluation mode.
        groups: Process groups.
        rows_in_flight: Rows of which what was sent may not have arrived yet.
        forward: Runs a row through a model chunk, as `forward_row`; what it returns may have more
            tokens, after those of the row.

    Attributes:
        num_chunks: Model chunks of each stage.
    """

    def __init__(
        self,
        model: StageModel,
        groups: ParallelGroups,
        rows_in_flight: int = 1,
        forward: Callable[[DiffusionGPTModel, Row, bool], Tensor] = forward_row,
    ) -> None:
        self._model, self._forward = model, forward
        self._chunks = chunks_of(model)
        self.num_chunks = len(self._chunks)
        self._pp, self._way_back = groups.pp, groups.way_back
        self._most_sent = rows_in_flight * self.num_chunks
        self._sent: deque[tuple[Any, Tensor]] = deque()

    def prepared(self, row: Row) -> PaddedRow:
        """A row, padded as sequence parallelism and the attention kernel need it."""
        (padded,), equally_long = padded_rows(self._model, [row])
        return PaddedRow(padded, row, equally_long)

    @torch.no_grad()
    def run(self, row: PaddedRow, chunk: int = 0) -> Tensor | None:
        """Run one row through the layers of a model chunk.

        Args:
            row: The row.
            chunk: Number of the chunk.

        Returns:
            After the last layers the row's hidden states [S, h], without the padding, or [n, h] of
            the tokens that are read; else None.
        """
        model = self._chunks[chunk]
        if not model.pre_process:
            model.set_input_tensor(self._received(len(row.row.token_ids)))
        output = self._forward(model, row.row, row.equally_long)
        if not model.post_process:
            self._send(output)
            return None
        if model.config.sequence_parallel:
            output = gather_from_sequence_parallel_region(output)
        return read_of_row(model, row.bare, output)

    def settle(self) -> None:
        """Wait until all that was sent has arrived."""
        while self._sent:
            self._sent.popleft()[0].wait()

    def _received(self, length: int) -> Tensor:
        """What the stage before made of a row of some length, [S / tp, 1, h]."""
        config = self._model.config
        parts = config.tensor_model_parallel_size if config.sequence_parallel else 1
        hidden = torch.empty(
            (length // parts, 1, config.hidden_size),
            dtype=config.pipeline_dtype,
            device=platform.device(),
        )
        group, rank = self._neighbour(-1)
        with NEIGHBOURS.waiting():
            _wait(dist.irecv(hidden, group=group, group_src=rank))
        return hidden

    def _send(self, hidden: Tensor) -> None:
        while len(self._sent) >= self._most_sent:
            _wait(self._sent.popleft()[0])
        group, rank = self._neighbour(1)
        self._sent.append((dist.isend(hidden, group=group, group_dst=rank), hidden))

    def _neighbour(self, step: int) -> tuple[ProcessGroup, int]:
        """The next stage (1) or the one before (-1): group of the messages, and its rank there."""
        assert self._pp is not None
        rank, stages = self._pp.rank() + step, self._pp.size()
        if 0 <= rank < stages:
            return self._pp, rank
        assert self._way_back is not None
        return self._way_back, rank % stages


def _wait(work: Any) -> None:
    """Wait for an operation; None: this rank takes no part in it."""
    if work is not None:
        work.wait()
