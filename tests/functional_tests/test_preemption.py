"""A run that signals stop, wherever they meet it, and that is started again, is the whole run."""

import dataclasses
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm.commands import main
from megatron_dlm.config import Config
from megatron_dlm.entry import DIVERGED_STATUS, PREEMPTED_STATUS
from megatron_dlm.stop_request import StopRequest, StopRequested
from megatron_dlm.training.best_checkpoint import BEST
from megatron_dlm.training.run_folder import latest_iteration, saved_iterations
from megatron_dlm.training.stored_batch import LEFTOVERS, STORED_BATCH
from tests.distributed_tests.spawn import run_distributed
from tests.faults.jobs import free_port
from tests.faults.moments import Moment
from tests.faults.runs import RunningProcess, check_same, events, metrics
from tests.tiny import (
    REPOSITORY,
    declare_diffusion_kind,
    reward_every_third,
    run_config,
    run_training,
    save_random_model,
    write_data,
)

ROLLOUTS = dict(
    num_rollouts=2,
    rollout_batch_size=8,
    max_response_length=8,
    epochs_per_rollout=2,
    lr_warmup_iters=2,
    log_interval=1,
)
"""Two rollouts, each of which serves four updates."""

RUNS: dict[str, dict[str, Any]] = {
    "opdlm": ROLLOUTS,
    "mixture": {**ROLLOUTS, "teacher_response_fraction": 0.5},
    "partial": {
        **ROLLOUTS,
        "max_response_length": 12,
        "dynamic_threshold": 0.2,
        "num_rollouts": 3,
        "partial_rollouts": 0.6,
        "max_response_rollouts": 2,
    },
    "d_opsd": {**ROLLOUTS, "objective": "d_opsd", "lora_rank": 3, "max_tries": 2},
    "off_policy": {"objective": "off_policy", "train_iters": 4, "save_interval": 50},
    "sft": {
        "objective": "sft",
        "train_iters": 4,
        "eval_interval": 1,
        "eval_iters": 1,
        "save_interval": 2,
        "eval_prompts_interval": 3,
        "eval_num_prompts": 5,
        "eval_max_response_length": 8,
        "eval_decodings": ["static:1"],
        "keep_checkpoints": 1,
        "keep_best_checkpoint": True,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preemption")
    prompts, examples = write_data(folder)
    RUNS["sft"] |= {"valid_data": str(examples), "eval_prompts": str(prompts)}
    save_random_model(folder / "dense")
    save_random_model(folder / "moe", moe=True)
    save_random_model(folder / "diffusion")
    declare_diffusion_kind(folder / "diffusion", "block_causal", shifted=False)
    return folder


def _config(folder: Path, run: Path, kind: str, **options: Any) -> Config:
    """The run as it is started, and started again."""
    options = {**RUNS[kind], **options}
    model = folder / ("diffusion" if kind == "d_opsd" else options.pop("model", "dense"))
    return run_config(folder, model, **options, save=str(run))


def _start(config: Config, moment: Moment) -> int:
    """The exit status of the command in this process."""
    file = Path(f"{config.logging.save}.yaml")
    file.write_text(config.to_yaml())
    with reward_every_third(), moment.arranged():
        return main(["train", "--config", str(file)])


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Path]:
    """Runs that nobody stops, as they are asked for."""
    return {}


def _whole(folder: Path, whole: dict[str, Path], kind: str) -> Path:
    if kind not in whole:
        whole[kind] = folder / f"whole_{kind}"
        assert _start(_config(folder, whole[kind], kind), Moment("update")) == 0
    return whole[kind]


@pytest.mark.parametrize(
    ("kind", "moment", "saved", "with_batch"),
    [
        # In the first rollout there is nothing to save yet.
        ("opdlm", Moment("rollout", 3, signal.SIGTERM), None, False),
        ("opdlm", Moment("teacher", 12, signal.SIGUSR1), 4, True),
        ("opdlm", Moment("update", 6, signal.SIGUSR2), 6, True),
        ("opdlm", Moment("update", 4, signal.SIGINT), 4, False),
        ("mixture", Moment("update", 7, signal.SIGTERM), 7, True),
        ("partial", Moment("update", 2, signal.SIGTERM), 2, True),
        ("partial", Moment("update", 8, signal.SIGTERM), 8, False),
        ("d_opsd", Moment("teacher", 3, signal.SIGTERM), None, False),
        ("d_opsd", Moment("update", 2, signal.SIGTERM), 2, True),
        ("off_policy", Moment("teacher", 9, signal.SIGTERM), 2, False),
        ("sft", Moment("validation", 1, signal.SIGTERM), 1, False),
        ("sft", Moment("save", 1, signal.SIGTERM), 2, False),
        # In the evaluations after the third and the last update, of 3 forwards each.
        ("sft", Moment("rollout", 2, signal.SIGTERM), 3, False),
        ("sft", Moment("rollout", 5, signal.SIGUSR1), 4, False),
    ],
    ids=lambda value: f"{value.place}{value.call}" if isinstance(value, Moment) else str(value),
)
def test_a_stopped_run_goes_on_bit_for_bit(
    folder: Path,
    tmp_path: Path,
    whole: dict[str, Path],
    kind: str,
    moment: Moment,
    saved: int | None,
    with_batch: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected, run = _whole(folder, whole, kind), tmp_path / "run"
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    capsys.readouterr()
    assert _start(_config(folder, run, kind), dataclasses.replace(moment)) == PREEMPTED_STATUS
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert events(run)[-1] == "stopped"
    assert latest_iteration(run) == saved
    out = capsys.readouterr().out
    assert f"{moment.number.name}: stopped after update {saved or 0}; " in out
    if saved is not None:
        assert f"saved {run}/iter_{saved:07d} (update {saved}, " in out
        checkpoint = run / f"iter_{saved:07d}"
        assert (checkpoint / STORED_BATCH).is_file() == with_batch
        assert (checkpoint / LEFTOVERS).is_file() == (kind == "partial")
    assert _start(_config(folder, run, kind), Moment("update")) == 0
    check_same(run, expected)
    for name in (BEST, "evaluation_samples.jsonl"):
        assert (run / name).is_file() == (kind == "sft")
        if kind == "sft":
            assert (run / name).read_text() == (expected / name).read_text()
    assert saved_iterations(run)[-1] == saved_iterations(expected)[-1]


def test_a_rollout_is_left_at_its_next_forward(folder: Path, tmp_path: Path) -> None:
    moment = Moment("rollout", 3)
    assert _start(_config(folder, tmp_path / "run", "opdlm"), moment) == PREEMPTED_STATUS
    assert moment.calls == 3


def test_a_run_stops_by_itself_after_its_minutes(folder: Path, tmp_path: Path) -> None:
    config = _config(folder, tmp_path / "run", "opdlm", exit_duration_in_mins=1e-4)
    assert _start(config, Moment("update")) == PREEMPTED_STATUS
    assert metrics(tmp_path / "run") == []


def test_checkpoints_are_written_by_the_minute(
    folder: Path, tmp_path: Path, whole: dict[str, Path]
) -> None:
    """Each rollout and each update asks for one, in the midst of a batch too."""
    run = tmp_path / "run"
    moment = Moment("save")
    assert _start(_config(folder, run, "opdlm", save_interval_minutes=1e-6), moment) == 0
    # The second rollout and eight updates: before the first update there is nothing.
    assert moment.calls == 9
    check_same(run, _whole(folder, whole, "opdlm"))


def _rank(rank: int, config: Config, moment: Moment | None, hit: int) -> tuple[str | None, int]:
    """One rank of a run, of which one gets a signal; why it stopped, and updates that it made."""
    request, counter = StopRequest(), Moment("update")
    try:
        with request.catching_signals(), counter.arranged():
            if moment is not None and rank == hit:
                with moment.arranged():
                    run_training(config, request)
            else:
                run_training(config, request)
    except StopRequested as stop:
        return str(stop), counter.calls
    return None, counter.calls


@pytest.mark.parametrize(
    ("layout", "moment", "hit"),
    [
        ({}, Moment("update", 2, signal.SIGUSR1), 1),
        ({"pipeline_model_parallel_size": 2}, Moment("rollout", 4, signal.SIGTERM), 1),
        (
            {
                "model": "moe",
                "expert_model_parallel_size": 2,
                "use_distributed_optimizer": True,
            },
            Moment("teacher", 2, signal.SIGUSR2),
            0,
        ),
    ],
    ids=["DP2 update", "PP2 rollout", "EP2 teacher"],
)
def test_all_ranks_stop_where_one_was_asked_to(
    folder: Path, tmp_path: Path, layout: dict[str, Any], moment: Moment, hit: int
) -> None:
    options = {**layout, "num_rollouts": 1, "lr_warmup_iters": 0}
    whole = _config(folder, tmp_path / "whole", "opdlm", **options)
    run_distributed(_rank, 2, whole, None, 0)
    config = _config(folder, tmp_path / "run", "opdlm", **options)
    stopped = run_distributed(_rank, 2, config, moment, hit)
    updates = 2 if moment.place == "update" else 0
    assert stopped == [(moment.number.name, updates)] * 2
    goes_on = _config(folder, tmp_path / "run", "opdlm", **options)
    assert run_distributed(_rank, 2, goes_on, None, 0) == [(None, 4 - updates)] * 2
    check_same(tmp_path / "run", tmp_path / "whole")


def test_torchrun_and_the_launcher_pass_a_signal_on_and_say_how_the_run_ended(
    folder: Path, tmp_path: Path
) -> None:
    """Real processes: launch.sh, torchrun and two ranks, after a first checkpoint."""
    run = tmp_path / "run"
    config = _config(folder, run, "opdlm", num_rollouts=60, save_interval=1)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    started = RunningProcess(
        ["bash", REPOSITORY / "examples" / "launch.sh", tmp_path / "run.yaml"],
        tmp_path / "log",
        SAVE=str(run),
        NPROC_PER_NODE="2",
        MASTER_PORT=str(free_port()),
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    )
    started.wait_until(lambda: len(metrics(run)) >= 6)
    started.send(signal.SIGUSR1)
    assert started.wait() == PREEMPTED_STATUS, started.output
    assert events(run)[-1] == "stopped"
    updates = len(metrics(run))
    assert latest_iteration(run) == updates < 60 * 4
    assert f"stopped after update {updates}; " in started.output


def _slurm(tmp_path: Path, status: int) -> tuple[int, Counter[str], str]:
    """Run a batch script with Slurm's commands replaced; srun ends with a status on SIGUSR1."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    calls = tmp_path / "calls"
    scripts = {
        "scontrol": f'echo "scontrol $*" >>{calls}\n[[ $1 != show ]] || echo node1',
        "srun": f"echo \"srun $*\" >>{calls}\ntrap 'exit {status}' USR1\n"
        f"touch {tmp_path}/running\nwhile true; do sleep 0.1; done",
    }
    for name, text in scripts.items():
        (bin_folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (bin_folder / name).chmod(0o755)
    job = RunningProcess(
        ["bash", REPOSITORY / "examples" / "train.slurm", "run.yaml", "--seed", "7"],
        tmp_path / "log",
        PATH=f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        SLURM_JOB_ID="17",
        SLURM_JOB_NAME="run",
        SLURM_JOB_NUM_NODES="1",
        SLURM_JOB_NODELIST="node1",
    )
    job.wait_until((tmp_path / "running").exists)
    job.send(signal.SIGUSR1)
    return job.wait(), Counter(calls.read_text().splitlines()), job.output


@pytest.mark.parametrize("status", [PREEMPTED_STATUS, DIVERGED_STATUS])
def test_a_slurm_job_is_queued_again_only_if_it_was_preempted(tmp_path: Path, status: int) -> None:
    ended, calls, output = _slurm(tmp_path, status)
    assert ended == status, output
    launched = "srun --kill-on-bad-exit=1 --cpu-bind=none bash examples/launch.sh run.yaml --seed 7"
    assert calls[launched] == 1
    assert calls["scontrol requeue 17"] == (status == PREEMPTED_STATUS)
