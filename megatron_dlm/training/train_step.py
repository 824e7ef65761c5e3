"""One optimizer update: Megatron's schedule over micro-batches, then its optimizer."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.data.packing import TrainingBatch, batch_to
from megatron_dlm.idle import NEIGHBOURS
from megatron_dlm.megatron_internals import known_grad_norm
from megatron_dlm.models.attention import release_masks
from megatron_dlm.models.model import head_weight, read_hidden_states
from megatron_dlm.objectives.base import LossInputs, Objective
from megatron_dlm.parallel import ParallelGroups, on_all_ranks
from megatron_dlm.training import update_figures


@dataclass(frozen=True)
class StepResult:
    """Results of one update; equal on all ranks.

    Attributes:
        loss: Loss sum over the global batch divided by its loss count.
        grad_norm: Norm of the whole gradient before clipping.
        supervised_tokens: In the global batch.
        student_seconds: Forward, backward and gradient reduction.
        optimizer_seconds: The optimizer's step.
        stage_wait_seconds: What this rank waited for neighbouring pipeline stages, within
            `student_seconds`; not equal on all ranks.
        is_made: Whether weights, optimizer and schedule were changed; they are not where loss or
            gradient norm is not finite.
        micro_batch_losses: The same of each of this rank's micro-batches alone; empty before the
            last pipeline stage. Not equal on all ranks.
        loss_by_position: See `StepMetrics`.
        causal_loss: See `StepMetrics`.
        student_entropy: See `StepMetrics`.
        counted: The sums of `counted` over all replicas.
    """

    loss: float
    grad_norm: float
    supervised_tokens: int
    student_seconds: float
    optimizer_seconds: float
    stage_wait_seconds: float
    is_made: bool
    micro_batch_losses: list[float]
    loss_by_position: list[float | None] | None
    causal_loss: float | None
    student_entropy: float | None
    counted: list[float]


def reduce_sums(own: Tensor, groups: ParallelGroups) -> Tensor:
    """Sum numbers of the last stages of all data-parallel replicas; the same on all ranks.

    Args:
        own: Of this rank, [n] float64; those of other stages are not looked at.
        groups: Process groups of the student.
    """
    sums = own.clone()
    if groups.is_last_stage and groups.replicas is not None:
        torch.distributed.all_reduce(sums, group=groups.replicas)
    if groups.pp is not None:
        torch.distributed.broadcast(sums, src=groups.pp_last_rank, group=groups.pp)
    return sums


def train_step(
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    objective: Objective,
    batches: Sequence[TrainingBatch],
    teacher_head: Tensor | None,
    groups: ParallelGroups,
    counted: Sequence[float] = (),
) -> StepResult:
    """Accumulate the gradient of all micro-batches and update the weights once.

    Where the loss or the gradient is not finite on any rank, nothing is updated on all of them.

    Args:
        chunks: The student's model chunks of this rank, wrapped in Megatron's DDP; one without
            virtual stages.
        optimizer: Its optimizer.
        scheduler: Its learning-rate schedule, advanced by one.
        objective: Computes the loss on the last pipeline stage.
        batches: This rank's micro-batches, at least one, under virtual stages a multiple of the
            stages; as many on all ranks of a replica, and on ranks that share experts.
        teacher_head: The teacher's output layer shard on the last stage, or None.
        groups: Process groups of the student.
        counted: Numbers of this replica to add up over all, in the same message as the losses.
    """
    NEIGHBOURS.take()
    started = time.perf_counter()
    device = platform.device()

    def forward_step(
        data_iterator: Iterator[TrainingBatch], model: DistributedDataParallel
    ) -> tuple[Tensor, Any]:
        packed = next(data_iterator)
        is_first = packed is batches[0]
        batch = batch_to(packed, device)
        output = model(
            input_ids=batch.row.token_ids[None],
            position_ids=batch.row.position_ids[None],
            attention_mask=batch.row.attention,
            read=batch.supervised,
        )

        def loss_func(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            head = head_weight(model)
            if model.use_forward_hook and head in model.param_to_bucket_group:
                # No module has the head as its weight here, so none of Megatron's hooks waits.
                model.param_to_bucket_group[head].finish_param_sync()
            inputs = LossInputs(
                hidden=read_hidden_states(model, output, batch.supervised),
                head=head,
                labels=batch.labels,
                weights=batch.weights,
                tp_group=groups.tp,
                targets=batch.targets,
                teacher_head=teacher_head,
            )
            loss_sum, per_token = objective.loss(inputs)
            count = torch.tensor(batch.loss_count, dtype=torch.int, device=device)
            tokens = len(batch.supervised)
            measured = torch.tensor([0.0, float(batch.loss_count), float(tokens)], device=device)
            measured[0] = loss_sum.detach()
            figures = update_figures.measured(
                objective, batch, inputs, per_token, with_entropy=is_first
            )
            return loss_sum, count, torch.cat((measured.double(), figures))

        return output, loss_func

    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    iterators = [iter(batches) for _ in chunks]
    measured = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=len(batches[0].row.token_ids),
        micro_batch_size=1,
    )
    release_masks()
    platform.synchronize()
    updating = time.perf_counter()
    optimizer.prepare_grads()
    norm = optimizer.get_grad_norm()  # before the step, which would spoil the weights
    grad_norm = float(norm)
    size = 3 + update_figures.SIZE
    # One message of all that ranks tell each other: its time does not depend on its length.
    numbers = [0.0] * size + [float(not math.isfinite(grad_norm)), *counted]
    own = torch.tensor(numbers, dtype=torch.float64).to(device)
    if measured:
        own[:size] = torch.stack(measured).sum(0)
    sums = reduce_sums(own, groups)
    if measured and groups.cp is not None:  # what a share of a row measures says little by itself
        of_rows = torch.stack(measured)
        torch.distributed.all_reduce(of_rows, group=groups.cp)
        measured = list(of_rows)
    # One wait for the device, not one a number.
    numbers = platform.to_host(torch.cat([sums, *measured])).tolist()
    loss_sum, loss_count, tokens, *figures = numbers[:size]
    failed, *counted = numbers[size : len(sums)]
    parts = [numbers[start : start + size] for start in range(len(sums), len(numbers), size)]
    loss = loss_sum / max(loss_count, 1.0)
    is_made = not failed and math.isfinite(loss)
    if groups.model is not None:  # each of its ranks has summed up with its like
        is_made = on_all_ranks(is_made)
    if is_made:
        with known_grad_norm(optimizer, norm):
            optimizer.step()
        scheduler.step(increment=1)
        for chunk in chunks:
            chunk.set_is_first_microbatch()  # the next forward converts the new weights to FP8
    platform.synchronize()
    return StepResult(
        loss=loss,
        grad_norm=grad_norm,
        supervised_tokens=int(tokens),
        student_seconds=updating - started,
        optimizer_seconds=time.perf_counter() - updating,
        stage_wait_seconds=NEIGHBOURS.take(),
        is_made=is_made,
        micro_batch_losses=[part[0] / max(part[1], 1.0) for part in parts],
        loss_by_position=update_figures.loss_by_position(objective, figures),
        causal_loss=update_figures.causal_loss(figures),
        student_entropy=update_figures.entropy(figures),
        counted=counted,
    )
