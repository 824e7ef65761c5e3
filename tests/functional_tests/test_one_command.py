"""One command starts a run and goes on with it; what has changed since is said, or refused."""

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm.config import Config, parse_config
from megatron_dlm.errors import UserError
from megatron_dlm.parallel import from_rank_zero
from megatron_dlm.training import loop, run_start
from megatron_dlm.training.inputs import DATA_CACHE
from megatron_dlm.training.run_folder import find_checkpoint, saved_iterations
from megatron_dlm.training.run_history import events, last_event
from megatron_dlm.training.run_start import decide_start
from tests.distributed_tests.spawn import run_distributed
from tests.faults.jobs import free_port
from tests.faults.runs import check_same, metrics
from tests.functional_tests.entry_points import PRETRAIN, Call, options
from tests.refusal import refusal
from tests.tiny import REPOSITORY, run_config, run_training, save_random_model, write_data


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_command")
    write_data(folder)
    save_random_model(folder / "dense")
    save_random_model(folder / "other", seed=1)
    return folder


@pytest.fixture
def whole(files: Path, call: Call, tmp_path: Path) -> list[str]:
    """The command of a run of two updates, which is done."""
    command = options(files, num_rollouts=2, save=tmp_path / "run", save_interval=1)
    assert call(PRETRAIN, *command).status == 0
    return command


def names(folder: Path) -> list[str]:
    return [event["event"] for event in events(folder)]


def die_after(monkeypatch: pytest.MonkeyPatch, call: Call, updates: int, *command: object) -> None:
    """Run a command whose process fails after so many updates."""
    steps = iter(range(updates))
    train_step = loop.train_step

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(steps, None) is None:
            raise OSError("the node is gone")
        return train_step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", failing)
        with pytest.raises(OSError, match="the node is gone"):
            call(PRETRAIN, *command)


def test_a_run_that_died_goes_on_by_the_same_command(
    files: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: list[str]
) -> None:
    run = tmp_path / "died"
    command = [str(run) if word == str(tmp_path / "run") else word for word in whole]
    die_after(monkeypatch, call, 0, *command)
    assert saved_iterations(run) == []
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "loss": 0.0}\n')
    outcome = call(PRETRAIN, *command, "--resume", "must")
    outcome.check_error(f"--save {run} holds no checkpoint of a run", "drop --resume")
    # Before its first checkpoint: from zero, which is said; what it had written is kept aside.
    monkeypatch.chdir(tmp_path)
    die_after(monkeypatch, call, 1, *command)
    assert (run / "metrics_superseded.jsonl").read_text() == '{"step": 1, "loss": 0.0}\n'
    outcome = call(PRETRAIN, *command, "--resume", "must")
    assert (outcome.status, outcome.stderr) == (0, "")
    assert f"going on from {run / 'iter_0000001'}: 1 updates are done" in outcome.stdout
    assert metrics(run) == metrics(tmp_path / "run")
    assert names(run) == ["started", "failed", "started", "failed", "resumed", "finished"]
    started, failed, *_, resumed, finished = events(run)
    assert {started["load"], resumed["load"]} == {str(files / "dense")}
    assert "OSError: the node is gone" in failed["error"]
    assert (resumed["iteration"], resumed["rollout"], resumed["changes"]) == (1, 1, {})
    assert resumed["checkpoint"] == str(run / "iter_0000001")
    assert (finished["iteration"], finished["rollout"]) == (2, 2)


def test_a_finished_run_says_so_and_changes_nothing(
    call: Call, tmp_path: Path, whole: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    checkpoint = find_checkpoint(run).stat().st_mtime_ns
    history = run / "history.jsonl"
    before = history.read_text()
    # Neither data are read nor a model built.
    monkeypatch.setattr("megatron_dlm.training.inputs.read_inputs", None)
    for _ in range(2):
        outcome = call(PRETRAIN, *whole, "--resume", "must")
        assert (outcome.status, outcome.stderr) == (0, "")
        (line,) = outcome.stdout.splitlines()
        assert line.startswith(f"the run in {run} is finished (2 updates, 2 rollouts); nothing")
        assert line.endswith("--num-rollouts may grow")
        assert history.read_text() == before
        assert find_checkpoint(run).stat().st_mtime_ns == checkpoint
    # One that was killed after its last checkpoint.
    history.write_text("".join(before.splitlines(keepends=True)[:-1]))
    assert call(PRETRAIN, *whole).status == 0
    assert names(run) == ["started", "finished"]


def test_what_cannot_change_is_listed_at_once_and_nothing_is_lost(
    files: Path, call: Call, tmp_path: Path, whole: list[str]
) -> None:
    run = tmp_path / "run"
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("".join((files / "prompts.jsonl").read_text().splitlines(True)[:20]))
    content = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    changes = ("--seed", 7, "--lr", 0.1, "--prompts", shorter, "--log-interval", 3)
    other = ("--load", files / "other", "--num-rollouts", 1)
    call(PRETRAIN, *whole, *changes, *other).check_error(
        f"--save = '{run}'",
        "--seed (then 1234, now 7), --lr (then 1e-05, now 0.1)",
        f"--prompts (other data: then '{files / 'prompts.jsonl'}', now '{shorter}')",
        f"--teacher-load (another teacher: then '{files / 'dense'}', now '{files / 'other'}')",
        f"--load (other weights: then '{files / 'dense'}', now '{files / 'other'}')",
        "--num-rollouts (2 are done: then 2, now 1)",
        "these can: --log-interval (then 1, now 3)",
        f"--load {run} --finetune",
    )
    call(PRETRAIN, *whole, "--resume", "never").check_error(
        "--resume = 'never'", f"--save {run} holds a run", "choose a new folder"
    )
    call(PRETRAIN, *whole, "--load", run, "--finetune").check_error(
        f"--save = '{run}'", "holds the run", "--no-finetune"
    )
    call(PRETRAIN, *whole, "--save", tmp_path / "new", "--resume", "must").check_error(
        "--resume = 'must'", "holds no checkpoint of a run"
    )
    assert not (tmp_path / "new").exists()
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == content


def test_what_may_change_is_said_and_recorded(
    files: Path, call: Call, tmp_path: Path, whole: list[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(files / "dense", tmp_path / "moved")
    command = [*whole, "--num-rollouts", 3, "--load", tmp_path / "moved", "--log-interval", 2]
    outcome = call(PRETRAIN, *command, "--dry-run")
    assert "# changed: --num-rollouts (then 2, now 3)" in outcome.stdout
    outcome = call(PRETRAIN, *command)
    for line in (
        "changed: --num-rollouts (then 2, now 3)",
        "changed: --log-interval (then 1, now 2)",
        f"changed: --load (then '{files / 'dense'}', now '{tmp_path / 'moved'}')",
    ):
        assert line in outcome.stdout.splitlines()
    assert names(run) == ["started", "finished", "resumed", "finished"]
    resumed = events(run)[2]
    assert resumed["changes"]["num_rollouts"] == [2, 3]
    assert resumed["changes"].keys() == {"num_rollouts", "log_interval", "load"}


def test_a_run_goes_on_without_the_weights_that_it_started_from(
    files: Path, call: Call, tmp_path: Path
) -> None:
    """And its checkpoints keep their tokenizer, though the one that it is read from is pruned."""
    shutil.copytree(files / "dense", tmp_path / "model")
    command = options(
        files,
        load=tmp_path / "model",
        prompts=None,
        num_rollouts=None,
        rollout_batch_size=None,
        max_response_length=40,
        objective="sft",
        train_data=files / "examples.jsonl",
        save=tmp_path / "run",
        save_interval=1,
        keep_checkpoints=1,
    )
    assert call(PRETRAIN, *command, "--train-iters", 1).status == 0
    shutil.rmtree(tmp_path / "model")
    outcome = call(PRETRAIN, *command, "--train-iters", 3)
    assert outcome.status == 0
    assert "is not there any more" in outcome.stderr
    assert saved_iterations(tmp_path / "run") == [3]
    assert (find_checkpoint(tmp_path / "run") / "hf" / "tokenizer.json").is_file()
    assert last_event(tmp_path / "run") is not None
    # Named as the run, it is still known what it started from.
    named = [str(tmp_path / "run") if word == str(tmp_path / "model") else word for word in command]
    assert call(PRETRAIN, *named, "--train-iters", 4).status == 0
    assert events(tmp_path / "run")[-2]["load"] == str(tmp_path / "model")


def test_what_a_start_goes_on_from(
    tmp_path: Path, whole: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def start(load: Path, save: Path, *more: str) -> run_start.RunStart:
        command = [*whole, "--load", str(load), "--save", str(save), "--num-rollouts", "3", *more]
        return decide_start(parse_config(command))

    def checkpoint(*folders: Path) -> Path:
        resumed = start(*folders).resumed
        assert resumed is not None
        return resumed.checkpoint

    first, second, new = run / "iter_0000001", run / "iter_0000002", tmp_path / "new"
    assert checkpoint(run, run) == second
    assert start(run, run).config.model.load == whole[whole.index("--load") + 1]
    assert checkpoint(run, new) == second
    assert start(run, new, "--finetune").resumed is None
    message = refusal(start, run, new, "--resume", "never")
    assert message is not None
    assert "add --finetune" in message
    # Wound back, but by a launcher that repeats its command only once.
    assert checkpoint(first, run) == first
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert checkpoint(first, run) == second


def test_a_run_that_was_wound_back_is_started_again_from_there(
    call: Call, tmp_path: Path, whole: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    expected = metrics(run)
    back = (*whole, "--load", run / "iter_0000001")
    die_after(monkeypatch, call, 0, *back)  # before it has saved anything
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    outcome = call(PRETRAIN, *back)
    assert f"going on from {run / 'iter_0000001'}: 1 updates are done" in outcome.stdout
    assert metrics(run) == expected


SCHEDULES: dict[str, Any] = dict(
    rollout_batch_size=4,
    lr_warmup_fraction=0.5,
    teacher_response_fraction=0.8,
    teacher_response_fraction_schedule="linear",
    final_dynamic_threshold=0.1,
    dynamic_threshold_schedule="linear",
    remasking_strategy="low_confidence_dynamic",
)


def test_a_longer_run_keeps_the_shape_of_its_schedules(files: Path, tmp_path: Path) -> None:
    """It is the run of that length with schedules of the old one, bit for bit."""

    def config(name: str, rollouts: int, **changes: Any) -> Config:
        values = {**SCHEDULES, "num_rollouts": rollouts, "save": str(tmp_path / name)}
        return run_config(files, files / "dense", **values, **changes)

    explicit = dict(
        lr_decay_iters=4, teacher_response_fraction_rollouts=4, dynamic_threshold_rollouts=4
    )
    expected = run_training(config("explicit", 6, **explicit))
    run_training(config("longer", 4))
    run_training(config("longer", 6))
    check_same(tmp_path / "longer", tmp_path / "explicit")
    rates = [line["lr"]["default"] for line in expected]
    assert rates[-1] == rates[-2] == 1e-4 < rates[-3]

    # Grown once more, and stretched: from here on the rates are those of a run of that length.
    extended = run_training(replace(config("longer", 9), extend=True))
    asked = config("asked", 9)
    shape = [_rate(update, asked.optimizer.lr, asked.optimizer.min_lr, 9) for update in range(9)]
    actual_rates = [line["lr"]["default"] for line in extended]
    assert actual_rates[:6] == rates
    assert actual_rates[6:] == pytest.approx(shape[6:], rel=1e-12)
    with pytest.raises(UserError, match=r"--num-rollouts \(9 are done: then 9, now 5\)"):
        run_training(config("longer", 5))


def _rate(update: int, peak: float, end: float, length: int) -> float:
    """Linear warm-up over half of the run, then a cosine, by their formulas."""

    warmup = round(0.5 * length)
    if update <= warmup:
        return peak * update / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * (update - warmup) / (length - warmup))) / 2


def _decide(rank: int, config: Config) -> Any:
    """A start on a rank that sees the shared folder late."""
    if rank == 1:
        run_start.is_run_folder = lambda path: False  # type: ignore[assignment]
    started = from_rank_zero(lambda: decide_start(config))
    try:
        from_rank_zero(lambda: decide_start(replace(config, resume="never")))
    except UserError as error:
        return started, str(error)
    return started, None


def test_all_ranks_start_as_rank_zero_does(files: Path, call: Call, tmp_path: Path) -> None:
    command = options(files, save=tmp_path / "run")
    assert call(PRETRAIN, *command).status == 0
    config = run_config(files, files / "dense", num_rollouts=2, save=str(tmp_path / "run"))
    (first, error), other = run_distributed(_decide, 2, config)
    assert (first, error) == other
    assert first.resumed.progress.iteration == 1
    assert "holds a run" in error


def test_the_script_goes_on_with_a_run_on_more_processes(
    files: Path, call: Call, tmp_path: Path
) -> None:
    """Its recipe has quotes and a comment, and names no model, as the environment does."""
    words = options(files, load=None, prompts=None, num_rollouts=None)
    pairs = dict(zip(words[::2], words[1::2], strict=True))
    recipe, run = tmp_path / "mine.yaml", tmp_path / "run"
    keys = "".join(f"{name[2:]}: {value}\n" for name, value in pairs.items())
    recipe.write_text(f"{keys}save: '{run}' # of this week\n")
    paths = {"load": files / "dense", "prompts": files / "prompts.jsonl"}
    flags = [word for name, path in paths.items() for word in (f"--{name}", path)]
    assert call(PRETRAIN, "--config", recipe, *flags, "--num-rollouts", 1).status == 0
    assert not (run / DATA_CACHE).exists()  # nobody to share with
    done = subprocess.run(
        ["bash", str(REPOSITORY / "examples" / "launch.sh"), str(recipe)],
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "NPROC_PER_NODE": "2",
            "MASTER_PORT": str(free_port()),
            "MODEL": str(files / "dense"),
            "PROMPTS": str(files / "prompts.jsonl"),
            "NUM_ROLLOUTS": "2",
        },
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("going on from") == 1
    assert names(run) == ["started", "finished", "resumed", "finished"]
    assert [line["step"] for line in metrics(run)] == [1, 2]
    started, _, resumed, _ = events(run)
    assert started["load"] == resumed["load"] == str(files / "dense")
    assert [event["environment"]["world_size"] for event in (started, resumed)] == [1, 2]
    assert len(list(run.glob(f"{DATA_CACHE}/*/*.safetensors"))) == 1  # two processes, one shard


def test_weights_that_lie_in_the_run_folder_are_no_run(
    files: Path, call: Call, tmp_path: Path
) -> None:
    """As in the quickstart: the run goes on, and its teacher is still what it started from."""
    shutil.copytree(files / "dense", tmp_path / "run" / "teacher")
    command = options(files, load=tmp_path / "run" / "teacher", save=tmp_path / "run")
    assert call(PRETRAIN, *command).status == 0
    assert call(PRETRAIN, *command, "--num-rollouts", 2).status == 0
    assert events(tmp_path / "run")[2]["load"] == str(tmp_path / "run" / "teacher")
