"""The validation loss: the run's objective on held-out data, always in the same states.

The samples are the first ones of the held-out data, and every random choice is keyed by the seed
and a sample's index. Losses of different steps, layouts and batch sizes are therefore of the same
masked tokens, under the final attention where training anneals it. Training is not affected.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_dlm import platform
from megatron_dlm.config import Config
from megatron_dlm.data.corpus import CorpusDataset
from megatron_dlm.data.packing import TrainingBatch, batch_to, empty_row
from megatron_dlm.data.prompts import ExampleDataset
from megatron_dlm.models.forward import forward_hidden, row_multiple
from megatron_dlm.models.model import StageModel, head_weight
from megatron_dlm.models.row_packing import RowPacking
from megatron_dlm.objectives.base import LossInputs, Objective
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.seeding import keyed_generator
from megatron_dlm.training.context_shares import own_shares
from megatron_dlm.training.train_step import reduce_sums

HELD_OUT = -1
"""Key of a held-out sample's draws, in place of the epoch."""

ROWS_PER_STAGE = 4
"""Rows in flight for each pipeline stage; their hidden states are in memory together."""


@dataclass(frozen=True)
class Validation:
    """Held-out data with the objective that computes the loss.

    Attributes:
        config: The run's configuration.
        objective: Lays the samples out and computes the loss; needs no teacher.
        data: At least `eval_iters` global batches of samples, which `read_inputs` has checked.
        groups: Process groups of the student.
    """

    config: Config
    objective: Objective
    data: ExampleDataset | CorpusDataset
    groups: ParallelGroups

    def is_due(self, iteration: int) -> bool:
        """Whether the loss is measured after this optimizer step."""
        interval = self.config.held_out.eval_interval
        return iteration == self.config.train_iters or bool(interval and iteration % interval == 0)

    @torch.no_grad()
    def loss(self, model: StageModel) -> float:
        """Loss sum over the held-out samples divided by its count; all ranks call this.

        Args:
            model: This rank's part of the student, bare.

        Returns:
            The same number on all ranks.
        """
        was_training = model.training
        model.eval()
        stages = self.config.parallel.pipeline_model_parallel_size
        at_once = 1 if stages == 1 else ROWS_PER_STAGE * stages
        sums = torch.zeros(3, dtype=torch.float64, device=platform.device())
        rows = self._rows(row_multiple(model))
        while batches := list(itertools.islice(rows, at_once)):
            hidden = forward_hidden(model, [batch.row for batch in batches])
            if hidden is None:
                continue
            for batch, row in zip(batches, hidden, strict=True):
                sums += self._sums(model, batch, row)
        model.train(was_training)
        sums = reduce_sums(sums, self.groups)
        return float(sums[0] / sums[1].clamp(min=1.0))

    def _rows(self, multiple: int) -> Iterator[TrainingBatch]:
        """This rank's rows, one global batch after the other; as many on every rank."""
        packing = RowPacking.of(self.config)
        samples = self.config.training.global_batch_size
        for first in range(0, self.config.held_out.eval_iters * samples, samples):
            documents = [
                self.objective.document(
                    self.data.sample(index, index),
                    keyed_generator(self.config.data.seed, index, HELD_OUT),
                )
                for index in range(first, first + samples)[
                    self.groups.dp_rank :: self.groups.dp_size
                ]
            ]
            rows = self.objective.rows(documents)
            rows += [empty_row(rows[0])] * (packing.agreed(len(rows)) - len(rows))
            yield from own_shares(rows, self.groups, multiple)

    def _sums(self, model: StageModel, batch: TrainingBatch, hidden: torch.Tensor) -> torch.Tensor:
        """Loss sum, loss count and supervised tokens of one row, as training measures them."""
        batch = batch_to(batch, platform.device())
        loss_sum, _ = self.objective.loss(
            LossInputs(
                hidden=hidden[batch.supervised],
                head=head_weight(model),
                labels=batch.labels,
                weights=batch.weights,
                tp_group=self.groups.tp,
            )
        )
        counts = torch.tensor([0, batch.loss_count, len(batch.supervised)], dtype=torch.float64)
        counts[0] = float(loss_sum)
        return counts.to(platform.device())
