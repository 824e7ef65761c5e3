"""What of a resumed run is compared with what it was started with."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_dlm.config import Config
from megatron_dlm.errors import UserError
from megatron_dlm.training import resume as resuming
from megatron_dlm.training.inputs import RunInputs, read_inputs
from tests.tiny import declare_diffusion_kind, run_config, save_random_model, write_data

INPUTS = cast(
    RunInputs,
    SimpleNamespace(data=SimpleNamespace(file=SimpleNamespace(fingerprint=1)), teacher=None),
)
COMMON = {"objective": "next_token", "load": "run", "train_iters": 4}


def check(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], **before: Any) -> None:
    config = Config.from_dict({**COMMON, **options})
    monkeypatch.setattr(
        resuming, "saved_config", lambda load: resuming.resumable_config(config, INPUTS) | before
    )
    resuming.check_resumable(config, INPUTS, "run")


def test_the_length_of_windows_is_fixed_where_there_are_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(monkeypatch, {"train_data": "t.jsonl"}, seq_length=64)
    check(monkeypatch, {"data_path": "corpus", "seq_length": 64}, seq_length=64)
    with pytest.raises(UserError, match=r"--seq-length = 2048: .*started with 64"):
        check(monkeypatch, {"data_path": "corpus"}, seq_length=64)
    with pytest.raises(UserError, match=r"--seed = 1234: .*started with 7"):
        check(monkeypatch, {"train_data": "t.jsonl"}, seed=7)


def test_what_a_run_has_no_use_for_may_have_been_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named again, it would be refused."""
    check(monkeypatch, {"train_data": "t.jsonl"}, block_size=32, rollout_batch_size=7)
    with pytest.raises(UserError, match=r"--block-size = 4: .*started with 32"):
        check(monkeypatch, {"objective": "sft", "train_data": "t.jsonl"}, block_size=32)


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
    monkeypatch: pytest.MonkeyPatch,
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
    monkeypatch.setattr(resuming, "saved_config", lambda load: saved)
    resumed = read(now)
    resuming.check_resumable(*resumed, "run")
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
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    objective: str,
    before: str | None,
    now: str | None,
) -> None:
    first, second = resume(monkeypatch, folder, objective, before, now)
    assert first == second
    assert (first is None) == (objective == "d_opsd" and now is None)  # its own teacher


@pytest.mark.parametrize(
    ("objective", "before", "now", "message"),
    [
        ("opdlm", "ar", "other_ar", r"'.*/other_ar': is not .*run, .*/ar'.*; name .*--finetune"),
        ("opdlm", None, "other_ar", r"'.*/other_ar': is not .*run, .*/ar'.*; name .*--finetune"),
        ("d_opsd", "diffusion", "other_diffusion", r"'.*/other_diffusion': is not .*/diffusion'"),
        ("d_opsd", "diffusion", None, r"None: .*run, .*/diffusion'.*; name .*--finetune"),
        ("d_opsd", None, "diffusion", r"'.*/diffusion': .*its own teacher; drop .*--finetune"),
    ],
)
def test_another_teacher_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    objective: str,
    before: str | None,
    now: str | None,
    message: str,
) -> None:
    with pytest.raises(UserError, match="--teacher-load = " + message):
        resume(monkeypatch, folder, objective, before, now)


def test_a_checkpoint_that_knows_no_teacher_is_resumed(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """Of an earlier version."""
    resume(monkeypatch, folder, "opdlm", "ar", "other_ar", resuming.TEACHER_FINGERPRINT)


def test_a_teacher_is_what_it_was_at_the_start(folder: Path, tmp_path: Path) -> None:
    """A run folder that goes on, or prunes its checkpoints, teaches on from what was loaded."""
    shutil.copytree(folder / "ar", tmp_path / "teacher")
    config = run_config(folder, folder / "ar", teacher_load=str(tmp_path / "teacher"))
    inputs = read_inputs(config)
    before = resuming.resumable_config(config, inputs)
    shutil.rmtree(tmp_path / "teacher")
    assert resuming.resumable_config(config, inputs) == before
    assert before[resuming.TEACHER_FINGERPRINT] is not None


def test_the_schedule_of_the_mixture_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rollouts would stretch it, and raise the teacher's share again."""
    longer = {
        "objective": "opdlm",
        "prompts": "p.jsonl",
        "train_iters": None,
        "num_rollouts": 9,
        "lr_decay_iters": 10,
        "teacher_response_fraction": 0.5,
    }
    check(monkeypatch, longer, teacher_response_fraction_rollouts=5)
    fading = {**longer, "teacher_response_fraction_schedule": "linear"}
    check(
        monkeypatch,
        {**fading, "teacher_response_fraction_rollouts": 5},
        teacher_response_fraction_rollouts=5,
    )
    with pytest.raises(UserError, match=r"--teacher-response-fraction-rollouts = 9: .*with 5"):
        check(monkeypatch, fading, teacher_response_fraction_rollouts=5)
