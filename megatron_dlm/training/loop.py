"""The training loop: collect trajectories, let the teacher annotate them, update the student.

Every objective runs through the same loop. A rollout batch is `--rollout-batch-size` prompts
answered by the student and serves several optimizer updates; for objectives without rollouts it is
one global batch of examples.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_dlm import platform
from megatron_dlm.data.packing import TrainingBatch, cut_row, empty_row, pack
from megatron_dlm.data.seeding import keyed_generator
from megatron_dlm.data.tokenizer import unusable_tokens
from megatron_dlm.models.attention import FLEX_TILE
from megatron_dlm.models.forward import most_rows
from megatron_dlm.models.model_provider import attention_backend
from megatron_dlm.objectives.attention_annealing import anneal_attention
from megatron_dlm.rollout.trajectory import Trajectory
from megatron_dlm.training.checkpointing import is_rank_zero
from megatron_dlm.training.convention_change import changed_convention
from megatron_dlm.training.metrics import MetricsLogger, PhaseTimes, StepMetrics
from megatron_dlm.training.optimizer import learning_rates
from megatron_dlm.training.rate_precision import unseen_in_bf16
from megatron_dlm.training.run import Run
from megatron_dlm.training.train_step import train_step


@dataclass(frozen=True)
class Collected:
    """A rollout batch: this rank's trajectories, and figures over those of all ranks."""

    trajectories: list[Trajectory]
    response_tokens: int
    response_length: float
    tokens_per_forward: float | None
    eos_rate: float
    accuracy: float | None
    solved_rate: float | None


def collect(run: Run) -> Collected:
    """Obtain the next rollout batch.

    Sample g of the run belongs to data-parallel rank g mod dp, so that each update's global batch
    is the same set of trajectories under every layout.
    """
    config = run.config
    dp_rank = parallel_state.get_data_parallel_rank()
    dp_size = parallel_state.get_data_parallel_world_size()
    count = config.rollout_batch_size
    samples = run.sampler.samples(run.progress.consumed_samples, count)[dp_rank::dp_size]
    trajectories = run.source.trajectories(samples, run.progress.rollout)
    # Responses of the teacher or a data set took the student no forward.
    rolled_out = [trajectory for trajectory in trajectories if trajectory.is_rollout]
    sums = torch.tensor(
        [
            sum(len(trajectory.response_ids) for trajectory in trajectories),
            sum(len(trajectory.response_ids) for trajectory in rolled_out),
            sum(trajectory.total_forwards for trajectory in rolled_out),
            sum(trajectory.finish_reason == "eos" for trajectory in trajectories),
            sum(bool(trajectory.correct) and trajectory.tries == 1 for trajectory in trajectories),
            sum(bool(trajectory.correct) for trajectory in trajectories),
        ],
        dtype=torch.float64,
        device=platform.device(),
    )
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    tokens, rolled_out_tokens, forwards, ended, right_at_once, right = sums.tolist()
    verifies = config.traits.verifies
    return Collected(
        trajectories=trajectories,
        response_tokens=int(tokens),
        response_length=tokens / count,
        tokens_per_forward=rolled_out_tokens / forwards if forwards else None,
        eos_rate=ended / count,
        accuracy=right_at_once / count if verifies else None,
        solved_rate=right / count if verifies else None,
    )


def row_multiple(run: Run) -> int:
    """What the length of a packed row must be a multiple of."""
    parallel = run.config.parallel
    multiple = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    if attention_backend(run.config) == "flex":
        multiple = -(-FLEX_TILE // multiple) * multiple
    return multiple


def micro_batches(
    run: Run, trajectories: list[Trajectory], update: int, multiple: int
) -> list[TrainingBatch]:
    """The packed rows of this rank for one update of a rollout batch (updates count from 0)."""
    training = run.config.training
    local = training.global_batch_size // parallel_state.get_data_parallel_world_size()
    updates_per_epoch = run.config.rollout_batch_size // training.global_batch_size
    epoch, position = divmod(update, updates_per_epoch)
    chosen = trajectories[position * local : (position + 1) * local]
    documents = [
        anneal_attention(
            run.objective.document(
                trajectory, keyed_generator(run.config.data.seed, trajectory.sample_index, epoch)
            ),
            run.config,
            trajectory.sample_index,
            run.progress.iteration,
        )
        for trajectory in chosen
    ]
    rows = [
        pack(
            documents[start : start + training.micro_batch_size],
            pad_multiple=multiple,
            row_mean=run.config.objective.loss_normalization == "row_mean",
        )
        for start in range(0, local, training.micro_batch_size)
    ]
    max_tokens = run.config.self_distillation.max_row_tokens
    if max_tokens is None:
        return rows
    rows = [part for row in rows for part in cut_row(row, max_tokens, multiple)]
    return rows + [empty_row(rows[0], multiple)] * (most_rows(len(rows)) - len(rows))


def train(run: Run) -> None:
    """Train to the end of the schedule; checkpoints and metrics go to the run folder."""
    config, progress = run.config, run.progress
    logger = MetricsLogger(
        config.logging.save,
        enabled=is_rank_zero(),
        total_steps=config.train_iters,
        first_step=progress.iteration,
        log_interval=config.logging.log_interval,
        tensorboard=config.logging.tensorboard,
        wandb_project=config.logging.wandb_project,
        run_config=config.to_dict(),
    )
    if config.logging.save is not None and is_rank_zero():
        (Path(config.logging.save) / "config.yaml").write_text(config.to_yaml())
    inputs = run.inputs
    warnings = changed_convention(config, inputs)
    unusable = unusable_tokens(
        inputs.tokenizer, inputs.architecture.vocab_size, str(inputs.tokenizer_folder)
    )
    warnings += [] if unusable is None else [unusable]
    if config.model.bf16:
        warnings += unseen_in_bf16(config, inputs.architecture)
    for line in warnings:
        logger.print(line)
    saved_at = progress.iteration
    multiple = row_multiple(run)
    while progress.iteration < config.train_iters:
        started = time.perf_counter()
        run.offload.enter("rollout")
        collected = collect(run)
        platform.synchronize()
        times = PhaseTimes(rollout=time.perf_counter() - started)
        if run.teacher is not None:
            started = time.perf_counter()
            run.offload.enter("teacher")
            run.teacher.annotate(collected.trajectories)
            platform.synchronize()
            times.teacher = time.perf_counter() - started
        progress.response_tokens_total += collected.response_tokens
        run.offload.enter("update")
        for update in range(config.updates_per_rollout):
            started = time.perf_counter()
            batches = micro_batches(run, collected.trajectories, update, multiple)
            laid_out = time.perf_counter() - started
            lr = learning_rates(run.student.optimizer)
            result = train_step(
                run.student.ddp,
                run.student.optimizer,
                run.student.scheduler,
                run.objective,
                batches,
                run.teacher.head if run.teacher is not None else None,
            )
            progress.iteration += 1
            times.student = laid_out + result.student_seconds
            times.optimizer = result.optimizer_seconds
            held_out_loss = None
            if run.validation is not None and run.validation.is_due(progress.iteration):
                started = time.perf_counter()
                held_out_loss = run.validation.loss(run.student.model, multiple)
                times.validation = time.perf_counter() - started
            logger.step(
                StepMetrics(
                    step=progress.iteration,
                    rollout=progress.rollout + 1,
                    loss=result.loss,
                    grad_norm=result.grad_norm,
                    lr=lr,
                    supervised_tokens=result.supervised_tokens,
                    response_tokens_total=progress.response_tokens_total,
                    response_length=collected.response_length,
                    tokens_per_forward=collected.tokens_per_forward,
                    eos_rate=collected.eos_rate,
                    accuracy=collected.accuracy,
                    solved_rate=collected.solved_rate,
                    time=times,
                    validation_loss=held_out_loss,
                )
            )
            times = PhaseTimes()
        progress.rollout += 1
        progress.consumed_samples += config.rollout_batch_size
        interval = config.logging.save_interval
        finished = progress.iteration >= config.train_iters
        if finished or (interval and progress.iteration // interval > saved_at // interval):
            run.save()
            saved_at = progress.iteration
    logger.close()
