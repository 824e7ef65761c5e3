"""The training loop: collect trajectories, let the teacher annotate them, update the student.

Every objective runs through the same loop. A rollout batch is `--rollout-batch-size` prompts
answered by the student and serves several optimizer updates; for objectives without rollouts it is
one global batch of examples.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dlm import platform
from megatron_dlm.data.packing import TrainingBatch, cut_row, empty_row
from megatron_dlm.data.tokenizer import unusable_tokens
from megatron_dlm.models.architecture import active_parameters
from megatron_dlm.models.attention import FLEX_TILE
from megatron_dlm.models.forward import most_rows
from megatron_dlm.models.model_provider import attention_backend
from megatron_dlm.training.best_checkpoint import HeldOutFigure
from megatron_dlm.training.checkpointing import is_rank_zero
from megatron_dlm.training.diffusion_kind_change import changed_diffusion_kind
from megatron_dlm.training.metrics import MetricsLogger, PhaseTimes, StepMetrics
from megatron_dlm.training.optimizer import learning_rates
from megatron_dlm.training.rate_precision import unseen_in_bf16
from megatron_dlm.training.run import Run
from megatron_dlm.training.run_history import Event, record
from megatron_dlm.training.train_step import train_step
from megatron_dlm.training.validation import Validation
from megatron_dlm.types.trajectory import Trajectory


@dataclass(frozen=True)
class Collected:
    """A rollout batch: this rank's trajectories, and statistics over those of all ranks.

    Attributes:
        trajectories: Of this rank. All ranks have the same number: a rank with one fewer has a
            copy of another rank's trajectory at the end, which counts nowhere.
        num_own: Number of trajectories without that copy.
        num_samples: Samples of all ranks.
        response_tokens: Number of tokens of all responses.
        trained_tokens: Response tokens that each update of an epoch trains on.
        response_length: Mean, in tokens.
        tokens_per_forward: Of the student's rollouts; None if there are none.
        eos_rate: Share of responses that ended in EOS.
        accuracy: See `StepMetrics`.
        solved_rate: See `StepMetrics`.
    """

    trajectories: list[Trajectory]
    num_own: int
    num_samples: int
    response_tokens: int
    trained_tokens: list[int]
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
    dp_rank, dp_size = run.groups.dp_rank, run.groups.dp_size
    consumed = run.progress.consumed_samples
    count = min(config.rollout_batch_size, config.num_samples - consumed)
    samples = run.sampler.samples(consumed, count)
    own = samples[dp_rank::dp_size]
    repeated = samples[: -(-count // dp_size) - len(own)]
    trajectories = run.source.trajectories([*own, *repeated], run.progress.rollout)
    ours = trajectories[: len(own)]
    # Responses of the teacher or a data set needed no forwards of the student.
    rolled_out = [trajectory for trajectory in ours if trajectory.is_rollout]
    local = config.training.global_batch_size // dp_size
    trained = [0] * -(-count // config.training.global_batch_size)
    for i, trajectory in enumerate(ours):
        if trajectory.correct is not False:  # wrong answers are not trained on
            trained[i // local] += len(trajectory.response_ids)
    sums = torch.tensor(
        [
            sum(len(trajectory.response_ids) for trajectory in ours),
            sum(len(trajectory.response_ids) for trajectory in rolled_out),
            sum(trajectory.total_forwards for trajectory in rolled_out),
            sum(trajectory.finish_reason == "eos" for trajectory in ours),
            sum(bool(trajectory.correct) and trajectory.tries == 1 for trajectory in ours),
            sum(bool(trajectory.correct) for trajectory in ours),
            *trained,
        ],
        dtype=torch.float64,
        device=platform.device(),
    )
    if run.groups.dp is not None:
        torch.distributed.all_reduce(sums, group=run.groups.dp)
    tokens, rolled_out_tokens, forwards, ended, right_at_once, right, *trained = sums.tolist()
    verifies = run.source.verifier is not None
    return Collected(
        trajectories=trajectories,
        num_own=len(own),
        num_samples=count,
        response_tokens=int(tokens),
        trained_tokens=[int(number) for number in trained],
        response_length=tokens / count,
        tokens_per_forward=rolled_out_tokens / forwards if forwards else None,
        eos_rate=ended / count,
        accuracy=right_at_once / count if verifies else None,
        solved_rate=right / count if verifies else None,
    )


def flops_per_token(run: Run) -> int:
    """Training FLOPs a token by the rule of OPDLM's equation 7: 6 N_student + 2 N_teacher."""
    student = active_parameters(run.inputs.architecture)
    teacher = 0
    if run.teacher is not None:
        own = run.inputs.teacher
        teacher = student if own is None else active_parameters(own.source.architecture)
    return 6 * student + 2 * teacher


def row_multiple(run: Run) -> int:
    """Packed rows are padded to a multiple of this."""
    parallel = run.config.parallel
    multiple = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    if attention_backend(run.config) == "flex":
        multiple = -(-FLEX_TILE // multiple) * multiple
    return multiple


def micro_batches(
    run: Run, collected: Collected, update: int, multiple: int
) -> list[TrainingBatch]:
    """The packed rows of this rank for one update of a rollout batch (updates count from 0)."""
    training = run.config.training
    local = training.global_batch_size // run.groups.dp_size
    epoch, position = divmod(update, len(collected.trained_tokens))
    chosen = collected.trajectories[position * local : (position + 1) * local]
    num_own = collected.num_own - position * local
    documents = [
        run.objective.update_document(trajectory, epoch, run.progress.iteration)
        for trajectory in chosen
    ]

    def row(start: int) -> TrainingBatch:
        stop = min(start + training.micro_batch_size, len(documents))
        row = run.objective.row(documents[start : max(min(stop, num_own), start + 1)], multiple)
        return row if start < num_own else empty_row(row, multiple)

    rows = [row(start) for start in range(0, len(documents), training.micro_batch_size)]
    max_tokens = run.objective.max_row_tokens
    if max_tokens is None:
        return rows
    rows = [part for row in rows for part in cut_row(row, max_tokens, multiple)]
    return rows + [empty_row(rows[0], multiple)] * (most_rows(len(rows)) - len(rows))


def train(run: Run) -> None:
    """Train to the end of the run; checkpoints, metrics and history go to the run folder."""
    resumed, inputs = run.inputs.resumed, run.inputs
    _record(
        run,
        "started" if resumed is None else "resumed",
        load=run.config.model.load,
        checkpoint=None if resumed is None else str(resumed.checkpoint),
        changes={change.option: [change.then, change.now] for change in inputs.changes},
    )
    try:
        _train(run)
    except Exception as error:
        _record(run, "failed", error=f"{type(error).__name__}: {error}")
        raise
    _record(run, "finished")


def _record(run: Run, event: Event, **fields: Any) -> None:
    """Add an event to the run's history."""
    if is_rank_zero():
        progress, folder = run.progress, run.config.logging.save
        at = {"iteration": progress.iteration, "rollout": progress.rollout}
        record(folder, event, **at, **fields)


def _train(run: Run) -> None:
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
    warnings = run.inputs.notices + changed_diffusion_kind(config, inputs)
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
    while progress.consumed_samples < config.num_samples:
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
        for update in range(config.updates_of(collected.num_samples)):
            started = time.perf_counter()
            batches = micro_batches(run, collected, update, multiple)
            laid_out = time.perf_counter() - started
            lr = learning_rates(run.student.optimizer)
            result = train_step(
                run.student.ddp,
                run.student.optimizer,
                run.student.scheduler,
                run.objective,
                batches,
                run.teacher.head if run.teacher is not None else None,
                run.groups,
            )
            progress.iteration += 1
            progress.trained_tokens_total += collected.trained_tokens[
                update % len(collected.trained_tokens)
            ]
            times.student = laid_out + result.student_seconds
            times.optimizer = result.optimizer_seconds
            if run.saver is not None:
                run.saver.poll()
            run.figure, held_out_loss = None, None
            if run.validation is not None and run.validation.is_due(progress.iteration):
                started = time.perf_counter()
                held_out_loss = _measure(run, run.validation, multiple)
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
                    trained_tokens_total=progress.trained_tokens_total,
                    flops_total=progress.trained_tokens_total * flops_per_token(run),
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
        progress.consumed_samples += collected.num_samples
        interval = config.logging.save_interval
        finished = progress.consumed_samples >= config.num_samples
        if finished or (interval and progress.iteration // interval > saved_at // interval):
            keeps_best = config.logging.keep_best_checkpoint
            if keeps_best and run.figure is None and run.validation is not None:
                _measure(run, run.validation, multiple)
            run.save()
            saved_at = progress.iteration
    if run.saver is not None:
        run.saver.finish()
    logger.close()


def _measure(run: Run, validation: Validation, multiple: int) -> float:
    """The validation loss of the student as it is now, which becomes the run's figure."""
    loss = validation.loss(run.student.model, multiple)
    run.figure = HeldOutFigure("validation_loss", loss, higher_is_better=False)
    return loss
