"""Train a block-diffusion language model.

megatron-dlm train --config examples/tiny/opdlm.yaml --prompts prompts.jsonl --save runs/mine
torchrun --nproc-per-node 8 -m megatron_dlm train --config examples/qwen3_8b/opdlm.yaml ...
"""

import gc
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_dlm.commands import parse_command
from megatron_dlm.config import Config, validate
from megatron_dlm.entry import PREEMPTED_STATUS, rank, world_size
from megatron_dlm.stop_request import StopRequest, StopRequested
from megatron_dlm.terminal import say
from megatron_dlm.training.run_history import last_event, record
from megatron_dlm.training.run_lock import owned_run_folder
from megatron_dlm.training.run_start import RunStart, decide_start

if TYPE_CHECKING:
    from megatron_dlm.teacher.job_line import JobLine
    from megatron_dlm.training.inputs import RunInputs
    from megatron_dlm.training.run import Run


def main(argv: Sequence[str]) -> int:
    """Parse, validate, build, train, close; a run that is there goes on."""
    config = parse_command("train", Config, argv)
    validate(config, world_size())
    if config.dry_run:
        return _dry_run(config)
    minutes = config.training.exit_duration_in_mins
    request = StopRequest(minutes if rank() == 0 else None)
    with request.catching_signals(), owned_run_folder(config.logging.save):
        # Imported step by step, so that bad input is reported before PyTorch is loaded, where ranks
        # share no folder, and wait for no server, which they would stop to wait for together.
        shares = config.logging.save or config.data.data_cache_path or config.teacher.teacher_url
        if config.teacher.teacher_ranks:
            return _one_side(config, request)
        if world_size() == 1 or not shares:
            return _run(decide_start(config), request)
        from megatron_dlm.parallel import from_rank_zero, joined

        with joined(config):
            return _run(from_rank_zero(lambda: decide_start(config)), request, have_joined=True)


def _one_side(config: Config, request: StopRequest) -> int:
    """A job with ranks of the teacher: what this process does in it."""
    from megatron_dlm.commands.teacher_ranks import ends_teacher, hold_teacher
    from megatron_dlm.parallel import Side, from_rank_zero, joined
    from megatron_dlm.teacher.job_line import JobLine

    with joined(config) as store:
        line = JobLine(store)
        if Side.of(config).holds_teacher:
            return hold_teacher(config, request, line)
        with ends_teacher(config, line) as ended:
            start = from_rank_zero(lambda: decide_start(config))
            ended.status = _run(start, request, have_joined=True, line=line)
        return ended.status


def _run(
    start: RunStart,
    request: StopRequest,
    *,
    have_joined: bool = False,
    line: "JobLine | None" = None,
) -> int:
    config, resumed = start.config, start.resumed
    if start.is_finished:
        _say(start.notice)
        _record_finished(start)
        return 0
    from megatron_dlm.data.token_shards import ALONE
    from megatron_dlm.training.inputs import joined_ranks, read_inputs

    try:
        inputs = read_inputs(config, resumed, joined_ranks() if have_joined else ALONE, request)
    except StopRequested as stopped:
        _report_stop(stopped, config, None)
        return PREEMPTED_STATUS
    _say(start.notice)
    from megatron_dlm.training.start_summary import start_summary

    _say("\n".join(start_summary(config, inputs, config.student_ranks(world_size()))))
    from megatron_dlm.parallel import ParallelGroups, initialized
    from megatron_dlm.stop_agreement import StopAgreement
    from megatron_dlm.teacher.job_line import ranks_client
    from megatron_dlm.training.loop import train
    from megatron_dlm.training.progress_display import progress_display
    from megatron_dlm.training.run import Run, build_run

    run: Run | None = None
    with initialized(config):
        groups = ParallelGroups.from_parallel_state()
        timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
        elsewhere = None if line is None else line.asked_to_stop
        with StopAgreement(request, groups, timeout, elsewhere) as stop:
            try:
                client = None if line is None else ranks_client(config, line, stop)
                with progress_display(rank() == 0):  # a teacher may answer prompts for hours
                    run = build_run(config, inputs, stop, client)
                gc.freeze()  # what is there stays: no later collection need look at it
                train(run)
            except StopRequested as stopped:
                _report_stop(stopped, config, run)
                return PREEMPTED_STATUS
            finally:
                gc.unfreeze()
    return 0


def _say(notice: str) -> None:
    if notice and rank() == 0:
        say(notice)


def _record_finished(start: RunStart) -> None:
    """Add the end to the history of a run that was killed between its last checkpoint and that."""
    save, resumed = start.config.logging.save, start.resumed
    last = None if save is None else last_event(save)
    if resumed is not None and (last is None or last["event"] != "finished"):
        progress = resumed.progress
        record(save, "finished", iteration=progress.iteration, rollout=progress.rollout)


def _dry_run(config: Config) -> int:
    start = decide_start(config)
    from megatron_dlm.training.inputs import read_inputs

    inputs = read_inputs(start.config, start.resumed)
    if rank() == 0:
        say(start.config.to_yaml())
        say(format_length(start.config.of_data(len(inputs.data))))
        notices = inputs.notices(start.config)
        for line in (start.notice, *notices, *_memory_notice(start.config, inputs)):
            if line:
                say(f"# {line}")
    return 0


def _memory_notice(config: Config, inputs: "RunInputs") -> list[str]:
    if config.parallel.device == "cpu":
        return []
    from megatron_dlm.planning.notice import memory_notice

    own = inputs.teacher
    teacher = None if own is None else own.source.architecture
    students = config.student_ranks(world_size())
    return memory_notice(config, inputs.architecture, teacher, students)


def format_length(config: Config) -> str:
    """The length of a run as a YAML comment, from a configuration `of_data`."""
    batch, samples, rollouts = config.rollout_batch_size, config.num_samples, config.num_rollouts
    what = "rollouts" if config.uses_rollouts else "updates"
    last = samples - (rollouts - 1) * batch
    short = f", the last of {last}" if last < batch else ""
    updates = f": {config.train_iters} updates" if config.uses_rollouts else ""
    records = config.num_records
    return f"# {records} records; {samples} samples in {rollouts} {what} of {batch}{short}{updates}"


def _report_stop(stopped: StopRequested, config: Config, run: "Run | None") -> None:
    """Say that the run is to be started again; before it was built, in its history too."""
    folder = config.logging.save
    if run is None:
        record(folder, "stopped", iteration=None, rollout=None, reason=str(stopped))
    where = "before the first update" if run is None else f"after update {run.progress.iteration}"
    kept = f"the same command goes on in {folder}" if folder else "nothing is saved: no --save"
    _say(f"{stopped}: stopped {where}; {kept}")
