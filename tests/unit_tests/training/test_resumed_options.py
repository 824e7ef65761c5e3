"""Options of a resumed run that are compared with those of its start."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_dlm.config import Config
from megatron_dlm.errors import UserError
from megatron_dlm.training import resume as resuming
from megatron_dlm.training.checkpointing import Progress
from megatron_dlm.training.inputs import RunInputs, read_inputs
from megatron_dlm.training.resume import Resumption
from tests.tiny import declare_diffusion_kind, run_config, save_random_model, write_data

INPUTS = cast(
    RunInputs,
    SimpleNamespace(
        data=SimpleNamespace(file=SimpleNamespace(path="t.jsonl", fingerprint=1)),
        teacher=None,
        resumed=None,
        load_fingerprint="1",
    ),
)
COMMON = {"objective": "next_token", "load": "weights", "train_iters": 4}


def resumption(saved: dict[str, Any], consumed_samples: int = 0) -> Resumption:
    progress = Progress(consumed_samples=consumed_samples, iteration=consumed_samples // 8)
    return Resumption("run", "--save", Path("run/iter_0000001"), saved, progress)


def check(options: dict[str, Any], *, extend: bool = False, **before: Any) -> list[str]:
    """Names of what a run changes that was saved with the same options, but for `before`."""
    config = replace(Config.from_dict({**COMMON, **options}), extend=extend)
    saved = resuming.resumable_config(config, INPUTS) | before
    changes = resuming.check_resumable(config, INPUTS, resumption(saved))
    assert all(change.is_allowed for change in changes)
    return [change.option for change in changes]


def test_the_length_of_windows_is_fixed_where_there_are_any() -> None:
    assert check({"train_data": "t.jsonl"}, seq_length=64) == []
    assert check({"data_path": "corpus", "seq_length": 64}, seq_length=64) == []
    with pytest.raises(UserError, match=r"--seq-length \(then 64, now 2048\)"):
        check({"data_path": "corpus"}, seq_length=64)
    with pytest.raises(UserError, match=r"--seed \(then 7, now 1234\)"):
        check({"train_data": "t.jsonl"}, seed=7)


def test_what_a_run_has_no_use_for_may_have_been_anything() -> None:
    """Named again, it would be refused."""
    assert check({"train_data": "t.jsonl"}, block_size=32, rollout_batch_size=7) == []
    with pytest.raises(UserError, match=r"--block-size \(then 32, now 4\)"):
        check({"objective": "sft", "train_data": "t.jsonl"}, block_size=32)


def test_an_option_that_is_newer_than_a_run_had_its_default() -> None:
    given = {**COMMON, "train_data": "t.jsonl", "global_batch_size": 8}
    saved = resuming.resumable_config(Config.from_dict(given), INPUTS)
    for newer in ("lr_batch_size", "log_interval"):
        del saved[newer]
    again = Config.from_dict({**given, "log_interval": 3})
    assert [d.option for d in resuming.check_resumable(again, INPUTS, resumption(saved))] == [
        "log_interval"
    ]
    changed = Config.from_dict({**given, "lr_batch_size": 2})
    with pytest.raises(UserError, match=r"--lr-batch-size \(then None, now 2\)"):
        resuming.check_resumable(changed, INPUTS, resumption(saved))


def test_all_differences_are_listed_with_what_is_allowed() -> None:
    changes = {"log_interval": 5, "save": "elsewhere", "tensor_model_parallel_size": 2}
    given = {"train_data": "t.jsonl"}
    assert check(given, **changes) == ["tensor_model_parallel_size", "log_interval"]
    fixed = {"seed": 7, "lr": 1.0, "data_fingerprint": 2, "train_data": "u.jsonl"}
    with pytest.raises(UserError) as error:
        check(given, **changes, **fixed)
    problem, remedy = str(error.value).rsplit("; ", 1)
    cannot, can = problem.split("these cannot change: ")[1].split(", these can: ")
    assert cannot == (
        "--seed (then 7, now 1234), --lr (then 1.0, now 1e-05), "
        "--train-data (other data: then 'u.jsonl', now 't.jsonl')"
    )
    assert can == "--tensor-model-parallel-size (then 2, now 1), --log-interval (then 5, now 1)"
    assert str(error.value).startswith("--save = 'run': ")
    assert "--load run --finetune" in remedy
    assert "\n" not in str(error.value)


def test_a_run_may_grow_and_shrink_but_not_below_what_is_done() -> None:
    config = Config.from_dict({**COMMON, "train_data": "t.jsonl", "lr_decay_iters": 9})
    saved = resuming.resumable_config(config, INPUTS)
    for updates in (3, 4, 9):
        now = config.changed(train_iters=updates)
        changes = resuming.check_resumable(now, INPUTS, resumption(saved, consumed_samples=24))
        assert [change.option for change in changes] == ["train_iters"] * (updates != 4)
    with pytest.raises(UserError, match=r"--train-iters \(3 are done: then 4, now 2\)"):
        resuming.check_resumable(
            config.changed(train_iters=2), INPUTS, resumption(saved, consumed_samples=24)
        )


def test_other_weights_to_start_from_are_told_from_moved_ones() -> None:
    given = {"train_data": "t.jsonl"}
    assert check(given, load="moved") == ["load"]
    assert check(given, load_fingerprint="2") == []  # a run folder that went on, say
    with pytest.raises(UserError, match=r"--load \(other weights: then 'moved', now 'weights'\)"):
        check(given, load="moved", load_fingerprint="2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    write_data(folder)
    for name, seed in (("ar", 0), ("other_ar", 1), ("diffusion", 0), ("other_diffusion", 1)):
        save_random_model(folder / name, seed=seed)
    for name in ("diffusion", "other_diffusion"):
        declare_diffusion_kind(folder / name, "block_causal", shifted=False)
    shutil.copytree(folder / "ar", folder / "moved_ar")
    shutil.copytree(folder / "diffusion", folder / "moved_diffusion")
    return folder


def resume(
    folder: Path,
    objective: str,
    before: str | None,
    now: str | None,
    *forgotten: str,
) -> tuple[str | None, str | None]:
    """Compare two runs that differ in their teacher; `before` was saved without some entries.

    Returns the fingerprints of the teachers.
    """

    def read(teacher: str | None) -> tuple[Config, RunInputs]:
        model = "ar" if objective == "opdlm" else "diffusion"
        options: dict[str, Any] = {} if objective == "opdlm" else {"lora_rank": 2}
        if teacher is not None:
            options["teacher_load"] = str(folder / teacher)
        config = run_config(folder, folder / model, objective=objective, **options)
        return config, read_inputs(config)

    saved = json.loads(json.dumps(resuming.resumable_config(*read(before))))
    for name in forgotten:
        del saved[name]
    resumed = read(now)
    resuming.check_resumable(*resumed, resumption(saved))
    teacher = resumed[1].teacher
    now_read = None if teacher is None else teacher.fingerprint
    return saved.get(resuming.TEACHER_FINGERPRINT), now_read


@pytest.mark.parametrize(
    ("objective", "before", "now"),
    [
        ("opdlm", "ar", "ar"),
        ("opdlm", "ar", "moved_ar"),
        ("opdlm", None, "moved_ar"),  # `--load` was the teacher
        ("d_opsd", "diffusion", "moved_diffusion"),
        ("d_opsd", None, None),
    ],
)
def test_a_teacher_is_known_by_its_weights(
    folder: Path,
    objective: str,
    before: str | None,
    now: str | None,
) -> None:
    first, second = resume(folder, objective, before, now)
    assert first == second
    assert (first is None) == (objective == "d_opsd" and now is None)  # its own teacher


@pytest.mark.parametrize(
    ("objective", "before", "now", "message"),
    [
        ("opdlm", "ar", "other_ar", r"another teacher: then '.*/ar', now '.*/other_ar'"),
        ("opdlm", None, "other_ar", r"another teacher: then '.*/ar', now '.*/other_ar'"),
        ("d_opsd", "diffusion", "other_diffusion", r"another teacher: then '.*/diffusion', now '"),
        ("d_opsd", "diffusion", None, r"whether it teaches itself: then '.*/diffusion', now None"),
        ("d_opsd", None, "diffusion", r"whether it teaches itself: then None, now '.*/diffusion'"),
    ],
)
def test_another_teacher_is_refused(
    folder: Path,
    objective: str,
    before: str | None,
    now: str | None,
    message: str,
) -> None:
    with pytest.raises(UserError, match=r"--teacher-load \(" + message):
        resume(folder, objective, before, now)


def test_a_checkpoint_that_knows_no_teacher_is_resumed(folder: Path) -> None:
    """Of an earlier version."""
    resume(folder, "opdlm", "ar", "other_ar", resuming.TEACHER_FINGERPRINT)


def test_a_teacher_is_what_it_was_at_the_start(folder: Path, tmp_path: Path) -> None:
    """A run folder that goes on, or prunes its checkpoints, teaches on from what was loaded."""
    shutil.copytree(folder / "ar", tmp_path / "teacher")
    config = run_config(folder, folder / "ar", teacher_load=str(tmp_path / "teacher"))
    inputs = read_inputs(config)
    before = resuming.resumable_config(config, inputs)
    shutil.rmtree(tmp_path / "teacher")
    assert resuming.resumable_config(config, inputs) == before
    assert before[resuming.TEACHER_FINGERPRINT] is not None


def test_schedules_keep_their_length_unless_they_are_extended() -> None:
    """More rollouts would stretch them, and raise the teacher's share again."""
    longer = {
        "objective": "opdlm",
        "prompts": "p.jsonl",
        "train_iters": None,
        "num_rollouts": 9,
        "lr_decay_iters": 10,
        "teacher_response_fraction": 0.5,
    }
    assert check(longer, teacher_response_fraction_rollouts=5) == []  # constant
    fading = {**longer, "teacher_response_fraction_schedule": "linear"}
    with pytest.raises(UserError, match=r"-fraction-rollouts \(then 5, now 9\)"):
        check(fading, teacher_response_fraction_rollouts=5)
    stretched = check(fading, extend=True, teacher_response_fraction_rollouts=5, lr_decay_iters=5)
    assert stretched == ["teacher_response_fraction_rollouts", "lr_decay_iters"]

    config = Config.from_dict({**COMMON, **fading, "lr_decay_iters": None})
    saved = {**config.to_dict(), "lr_decay_iters": 20, "teacher_response_fraction_rollouts": 5}
    kept = resuming.keep_schedules(config, saved)
    assert kept.lr_decay_iters == 20
    assert kept.rollout.teacher_response_fraction_rollouts == 5
    assert kept.rollout.dynamic_threshold_rollouts is None  # has no schedule
