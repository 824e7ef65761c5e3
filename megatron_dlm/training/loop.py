"""The training loop: collect trajectories, let the teacher annotate them, update the student.

Every objective runs through the same loop. A rollout batch is `--rollout-batch-size` prompts
answered by the student and serves several optimizer updates; for objectives without rollouts it is
one global batch of examples.
"""

import time
from pathlib import Path
from typing import Any

from megatron_dlm import platform
from megatron_dlm.data.packing import TrainingBatch, empty_row
from megatron_dlm.data.tokenizer import unusable_tokens
from megatron_dlm.entry import warn
from megatron_dlm.errors import TrainingDiverged
from megatron_dlm.idle import NEIGHBOURS
from megatron_dlm.models.architecture import active_parameters
from megatron_dlm.models.forward import row_multiple, rows_of_rounds
from megatron_dlm.models.row_packing import RowPacking
from megatron_dlm.output_file import write_file
from megatron_dlm.parallel import from_rank_zero
from megatron_dlm.report.page import REPORT, write_report
from megatron_dlm.rollout.trajectory_engine import AheadEngine
from megatron_dlm.stop_request import StopRequested
from megatron_dlm.teacher.frozen import FrozenTeacher
from megatron_dlm.teacher.remote import RemoteTeacher
from megatron_dlm.training import divergence
from megatron_dlm.training.best_checkpoint import (
    HeldOutFigure,
    add_figure,
    best_like,
    lacks_accuracy,
    record_best,
)
from megatron_dlm.training.checkpoint_writing import write_latest
from megatron_dlm.training.checkpointing import is_rank_zero
from megatron_dlm.training.context_shares import own_shares
from megatron_dlm.training.diffusion_kind_change import changed_diffusion_kind
from megatron_dlm.training.held_out_evaluation import AnsweredPrompts, HeldOutEvaluation
from megatron_dlm.training.metrics import MetricsLogger, PhaseTimes, StepMetrics
from megatron_dlm.training.optimizer import learning_rates
from megatron_dlm.training.progress_display import progress_display
from megatron_dlm.training.rate_precision import unseen_in_bf16
from megatron_dlm.training.rollout_ahead import begin_if_due
from megatron_dlm.training.rollout_batch import Collected, collect
from megatron_dlm.training.run import Run
from megatron_dlm.training.run_folder import iteration_folder
from megatron_dlm.training.run_history import Event, record
from megatron_dlm.training.samples import record_evaluation_samples, record_samples
from megatron_dlm.training.save_schedule import SaveSchedule
from megatron_dlm.training.throughput import ThroughputMeter
from megatron_dlm.training.train_step import train_step
from megatron_dlm.training.validation import Validation

SAVING_SECONDS = 120.0
"""What a checkpoint that is being written gets before an error ends the process."""


def flops_per_token(run: Run) -> int:
    """Training FLOPs a token by the rule of OPDLM's equation 7: 6 N_student + 2 N_teacher."""
    student = active_parameters(run.inputs.architecture)
    teacher = 0
    if run.teacher is not None:
        own = run.inputs.teacher
        teacher = student if own is None else active_parameters(own.source.architecture)
    return 6 * student + 2 * teacher


def micro_batches(run: Run, collected: Collected, update: int) -> list[TrainingBatch]:
    """The packed rows of this rank for one update of a rollout batch (updates count from 0)."""
    epoch = update // len(collected.trained_tokens)
    share = collected.of_update(update)
    # Without one of its own, the rank lays out another's, to run empty rows like it.
    documents = [
        run.objective.update_document(trajectory, epoch, run.progress.iteration)
        for trajectory in share.own or share.trajectories[:1]
    ]
    packing = RowPacking.of(run.config)
    rows = run.objective.rows(documents)
    empty = empty_row(rows[0])
    rows = rows if share.own else []
    planned = len(rows)
    if packing.max_tokens is None:
        planned = len(packing.rows([0] * len(share.trajectories)))
    in_step = run.inputs.architecture.is_moe or run.config.model.fp8_format is not None
    # Each row has collectives of ranks that share experts or FP8's scales; else none waits for one.
    agreed = packing.agreed(planned) if in_step else max(planned, 1)
    agreed = rows_of_rounds(run.student.model, agreed)
    rows += [empty] * (agreed - len(rows))
    teacher_hidden = run.teacher.hidden if isinstance(run.teacher, FrozenTeacher) else None
    return own_shares(rows, run.groups, row_multiple(run.student.model), teacher_hidden)


def train(run: Run) -> None:
    """Train to the end of the run; checkpoints, metrics, history and a report go to its folder.

    Raises:
        StopRequested: On all ranks, after what there is has been saved.
        TrainingDiverged: On all ranks, see `divergence`.
    """
    try:
        _train_with_history(run)
    finally:
        if isinstance(run.teacher, RemoteTeacher):
            run.teacher.close()
        _report(run)


def _report(run: Run) -> None:
    """Write the page about the run, as it has come so far."""
    folder = run.config.logging.save
    if folder is None or not is_rank_zero():
        return
    file = Path(folder) / REPORT
    try:
        write_report([folder], file, "--save")
    except Exception as error:  # whatever it is, the run itself is as good as it was
        warn(f"{file} is not written ({type(error).__name__}: {error})")


def _train_with_history(run: Run) -> None:
    resumed, inputs = run.inputs.resumed, run.inputs
    _record(
        run,
        "started" if resumed is None else "resumed",
        load=run.config.model.load,
        # Not always the one that was found: of a damaged one, the one before is taken.
        checkpoint=None
        if resumed is None
        else str(iteration_folder(resumed.checkpoint.parent, run.progress.iteration)),
        changes={change.option: [change.then, change.now] for change in inputs.changes},
    )
    try:
        _train(run)
    except StopRequested as stop:
        _record(run, "stopped", reason=str(stop))
        raise
    except TrainingDiverged:
        raise  # recorded with what is known of it
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
    config = run.config
    logger = MetricsLogger(
        config.logging.save,
        enabled=is_rank_zero(),
        total_steps=config.train_iters,
        first_step=run.progress.iteration,
        log_interval=config.logging.log_interval,
        tensorboard=config.logging.tensorboard,
        wandb_project=config.logging.wandb_project,
        run_config=config.to_dict(),
    )
    if config.logging.save is not None and is_rank_zero():
        write_file(Path(config.logging.save) / "config.yaml", config.to_yaml(), "--save")
        if iteration_folder(config.logging.save, run.progress.iteration).is_dir():
            # Of a run that was wound back: what starts it again does not find the later ones.
            write_latest(config.logging.save, run.progress.iteration)
    for line in _warnings(run):
        logger.print(line)
    try:
        with progress_display(is_rank_zero()):
            _Training(run, logger).run_batches()
            run.finish_saving()
    except StopRequested:
        run.finish_saving()
        raise
    except Exception:
        if run.saver is not None:
            run.saver.leave(SAVING_SECONDS)
        raise
    finally:
        if isinstance(run.source.engine, AheadEngine):
            run.source.engine.close()
        logger.close()


def _warnings(run: Run) -> list[str]:
    config, inputs = run.config, run.inputs
    warnings = inputs.notices(config) + changed_diffusion_kind(config, inputs)
    unusable = unusable_tokens(
        inputs.tokenizer, inputs.architecture.vocab_size, str(inputs.tokenizer_folder)
    )
    warnings += [] if unusable is None else [unusable]
    if config.model.bf16:
        warnings += unseen_in_bf16(config, inputs.architecture)
    return warnings


class _Training:
    """One process's way through the rollout batches."""

    def __init__(self, run: Run, logger: MetricsLogger) -> None:
        self._run = run
        self._logger = logger
        self._throughput = ThroughputMeter(run)
        self._flops_per_token = flops_per_token(run)
        logging = run.config.logging
        self._is_new_best = self._has_left_evaluation = False
        self._best: HeldOutFigure | None = None
        self._saves = SaveSchedule(
            logging.save_interval, logging.save_interval_minutes, run.progress.iteration
        )

    def run_batches(self) -> None:
        """All that are left.

        Raises:
            StopRequested: On all ranks, after what there is has been saved.
        """
        run = self._run
        self._make_up_evaluation()
        while run.progress.consumed_samples < run.config.num_samples:
            times = PhaseTimes()
            collected = self._collect(times)
            updates = run.config.updates_of(collected.num_samples)
            begin_if_due(run, collected, updates - run.progress.updates_of_batch)
            self._annotate(collected, times)
            run.offload.enter("update")
            for update in range(run.progress.updates_of_batch, updates):
                begin_if_due(run, collected, updates - update)
                self._update(collected, update, times)
                times = PhaseTimes()
                if update + 1 == updates:
                    run.progress.rollout += 1
                    run.progress.consumed_samples += collected.num_samples
                    run.progress.updates_of_batch = 0
                self._save_or_stop(None if update + 1 == updates else collected)

    def _collect(self, times: PhaseTimes) -> Collected:
        run, started = self._run, time.perf_counter()
        if run.config.uses_rollouts:
            run.student.gather_weights()
        run.offload.enter("rollout")
        NEIGHBOURS.take()
        is_new = not run.stored_batch
        try:
            collected = collect(run)
        except StopRequested:
            self._save(None, stops=True)  # what was rolled out is rolled out again, the same
            raise
        platform.synchronize()
        times.rollout = time.perf_counter() - started
        self._throughput.rolled_out(collected.decoded_tokens)
        if is_new and run.config.uses_rollouts:
            run.is_saved = False
            record_samples(run, collected)
        self._save_or_stop(collected)
        return collected

    def _annotate(self, collected: Collected, times: PhaseTimes) -> None:
        run, started = self._run, time.perf_counter()
        if run.teacher is None:
            return
        run.offload.enter("teacher")
        NEIGHBOURS.take()
        try:
            with run.stop.settled():
                run.teacher.annotate(collected.trajectories)
        except StopRequested:
            self._save(collected, stops=True)
            raise
        platform.synchronize()
        times.teacher = time.perf_counter() - started
        self._throughput.annotated(collected.own)

    def _update(self, collected: Collected, update: int, times: PhaseTimes) -> None:
        """One update, its validation and its metrics."""
        run, progress = self._run, self._run.progress
        started = time.perf_counter()
        batches = micro_batches(run, collected, update)
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
            self._throughput.counted(batches),
        )
        run.is_saved = False
        if update == 0:
            progress.response_tokens_total += collected.response_tokens
        progress.iteration += 1
        progress.updates_of_batch += 1
        if result.is_made:
            progress.skipped_in_a_row = 0
            progress.trained_tokens_total += collected.trained_tokens[
                update % len(collected.trained_tokens)
            ]
        else:
            samples = collected.of_update(update).own
            self._logger.print(divergence.handle(run, samples, result))
        times.student = laid_out + result.student_seconds
        times.optimizer = result.optimizer_seconds
        if run.saver is not None:
            run.saver.poll()
        run.figure, held_out_loss = None, None
        if run.validation is not None and run.validation.is_due(progress.iteration):
            started = time.perf_counter()
            held_out_loss = self._measure(run.validation)
            times.validation = time.perf_counter() - started
        answered = self._evaluate_if_due()
        if answered is not None:
            times.evaluation = answered.seconds
        self._logger.step(
            StepMetrics(
                step=progress.iteration,
                rollout=progress.rollout + 1,
                loss=result.loss,
                grad_norm=result.grad_norm,
                lr=lr,
                supervised_tokens=result.supervised_tokens,
                response_tokens_total=progress.response_tokens_total,
                trained_tokens_total=progress.trained_tokens_total,
                flops_total=progress.trained_tokens_total * self._flops_per_token,
                response_length=collected.response_length,
                tokens_per_forward=collected.tokens_per_forward,
                eos_rate=collected.eos_rate,
                accuracy=collected.accuracy,
                solved_rate=collected.solved_rate,
                time=times,
                throughput=self._throughput.update(
                    result.counted, times, result.stage_wait_seconds
                ),
                validation_loss=held_out_loss,
                skipped_updates=progress.skipped_updates,
                loss_by_position=result.loss_by_position,
                causal_loss=result.causal_loss,
                student_entropy=result.student_entropy,
                tokens_by_step=collected.tokens_by_step,
                response_lengths=collected.response_lengths,
                staleness=collected.staleness,
                weight_lag=None
                if collected.weight_version is None
                else progress.iteration - 1 - collected.weight_version,
                evaluation=None if answered is None else answered.to_json(),
            )
        )

    def _evaluate_if_due(self) -> AnsweredPrompts | None:
        """The answers to the held-out prompts after an update; None if they are not due.

        Those that a request to stop breaks off are made up for when the run goes on.
        """
        run = self._run
        if run.evaluation is None or not run.evaluation.is_due(run.progress.iteration):
            return None
        try:
            answered = self._answer(run.evaluation)
        except StopRequested:
            self._has_left_evaluation = True
            return None
        if run.config.logging.keep_best_checkpoint and is_rank_zero():
            self._compare(answered.figure)
        return answered

    def _compare(self, figure: HeldOutFigure) -> None:
        """Have a checkpoint saved if none is as good; only rank 0 has to know."""
        best, folder = self._best, self._run.config.logging.save
        if best is None:  # later on it may not be published yet
            assert folder is not None
            best = best_like(folder, self._run.progress.iteration, figure)
        self._is_new_best = best is None or figure.merit > best.merit
        self._best = figure if self._is_new_best else best

    def _answer(self, evaluation: HeldOutEvaluation) -> AnsweredPrompts:
        """Answer the held-out prompts, and show some of the answers."""
        run = self._run
        run.student.gather_weights()
        run.offload.enter("evaluation")
        try:
            answered = evaluation.answer(run.student.model)
        finally:
            run.offload.enter("update")
        run.figure = answered.figure
        record_evaluation_samples(run, answered.samples)
        self._logger.evaluation_samples(run.progress.iteration, answered.samples)
        return answered

    def _make_up_evaluation(self) -> None:
        """Answer the held-out prompts where the checkpoint that the run goes on from lacks that.

        A request to stop broke it off, or the prompts were not given then.

        Raises:
            StopRequested: On all ranks.
        """
        run = self._run
        resumed, progress = run.inputs.resumed, run.progress
        if resumed is None or run.evaluation is None:
            return
        # Not always the one that was found: of a damaged one, the one before is taken.
        folder = iteration_folder(resumed.checkpoint.parent, progress.iteration)
        if not run.evaluation.is_due(progress.iteration) or from_rank_zero(
            lambda: not lacks_accuracy(folder)
        ):
            return
        answered = self._answer(run.evaluation)
        self._logger.late_evaluation(progress.iteration, answered.to_json(), answered.seconds)
        save = run.config.logging.save
        if save is not None and is_rank_zero() and folder.parent.resolve() == Path(save).resolve():
            add_figure(folder, answered.figure)
            record_best(save, progress.iteration)

    def _save_or_stop(self, batch: Collected | None) -> None:
        """Save where it is due, and leave where a rank was asked to; all ranks call this.

        Args:
            batch: What has updates to serve; None at the end of a rollout's last one.

        Raises:
            StopRequested: On all ranks, after what there is has been saved.
        """
        run, progress = self._run, self._run.progress
        is_due = self._saves.is_due(progress.iteration, ends_rollout=batch is None)
        is_due, self._is_new_best = is_due or self._is_new_best, False
        decision = run.stop.decide(is_due)
        is_finished = progress.consumed_samples >= run.config.num_samples
        if is_finished or decision.save or decision.stop:
            self._save(batch, stops=bool(decision.stop))
        if decision.stop and (not is_finished or self._has_left_evaluation):
            raise StopRequested(decision.stop)

    def _save(self, batch: Collected | None, *, stops: bool = False) -> None:
        """Save what has changed since the last checkpoint.

        Before the first update nothing is saved: there is no optimizer state yet, and a run that
        starts anew is the same.
        """
        run = self._run
        if not run.is_saved and run.progress.iteration:
            run.offload.enter("update")  # the optimizer is where it is saved from
            run.student.gather_weights()
            divergence.check_weights(run)
            by_loss = run.config.logging.keep_best_checkpoint and run.evaluation is None
            if by_loss and run.figure is None and run.validation is not None:
                self._measure(run.validation)
            if batch is None or not run.config.uses_rollouts:
                run.save(stops=stops)
            else:
                run.save(batch.own, stops=stops)
        self._saves.saved(run.progress.iteration)

    def _measure(self, validation: Validation) -> float:
        """The validation loss of the student as it is now; the run's figure, if no accuracy is."""
        self._run.student.gather_weights()
        loss = validation.loss(self._run.student.model)
        if self._run.evaluation is None:
            self._run.figure = HeldOutFigure("validation_loss", loss, higher_is_better=False)
        return loss
