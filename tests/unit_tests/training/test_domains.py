"""Limits by domain in rollouts and teacher responses; dropped prompts in runs and on resumption."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm.config import Config
from megatron_dlm.errors import UserError
from megatron_dlm.parallel import initialized
from megatron_dlm.training import resume as resuming
from megatron_dlm.training.checkpointing import Progress
from megatron_dlm.training.inputs import read_inputs
from megatron_dlm.training.rollout_batch import collect
from megatron_dlm.training.run import build_run
from tests.tiny import run_config, save_random_model, write_data

LIMITS = {"math": 3, "default": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("domains")
    prompts, _ = write_data(folder, 8)
    save_random_model(folder / "ar")
    records = [json.loads(line) for line in prompts.read_text().splitlines()]
    for i, record in enumerate(records):
        record["domain"] = ("math", "code")[i % 2]
        record["messages"][0]["content"] = "Tom has 2 eggs." * (9 if i == 3 else 1)
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def options(folder: Path, **changes: Any) -> Config:
    values = dict(
        num_rollouts=None,
        num_epochs=1,
        rollout_batch_size=8,
        max_response_length=16,
        max_response_length_by_domain=LIMITS,
        max_prompt_length=50,
        long_prompts="drop",
        dynamic_threshold=1.0,
    )
    return run_config(folder, folder / "ar", **{**values, **changes})


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_responses_are_as_long_as_their_domain_allows(folder: Path, fraction: float) -> None:
    """The student's and the teacher's; the length schedule is a limit beside it."""
    changes: dict[str, Any] = dict(
        response_length_schedule="linear", min_response_length=8, response_length_warmup_rollouts=9
    )
    if fraction:
        changes = {"teacher_response_fraction": fraction, "save": str(folder / "teacher")}
    changes["chat_template_kwargs"] = {"enable_thinkin": True}
    config = options(folder, **changes)
    inputs = read_inputs(config)
    assert inputs.notices(config) == [
        "--chat-template-kwargs: the chat template names no variable enable_thinkin, so it changes "
        "nothing",
        f"{folder / 'prompts.jsonl'}: 1 of 8 prompts dropped, longer than --max-prompt-length",
    ]
    with initialized(config):
        run = build_run(config, inputs)
        assert (run.config.num_samples, run.config.train_iters) == (7, 2)
        collected = collect(run)
    assert collected.num_samples == 7
    cut: dict[str, set[int]] = {"math": set(), "code": set()}
    for trajectory in collected.trajectories:
        assert trajectory.is_rollout == (fraction == 0)
        if trajectory.finish_reason == "length":
            cut[trajectory.record["domain"]].add(len(trajectory.response_ids))
    assert cut == {"math": {3}, "code": {16 if fraction else 8}}


def test_stored_responses_belong_to_their_limits(folder: Path) -> None:
    save = {"save": str(folder / "store"), "teacher_response_fraction": 1.0}
    teacher = read_inputs(options(folder, **save)).teacher
    assert teacher is not None
    store = teacher.responses
    assert store is not None
    store.create()
    read_inputs(options(folder, **save))
    for changes in ({"max_response_length_by_domain": {}}, {"long_prompts": "truncate"}):
        with pytest.raises(UserError, match="--teacher-responses"):
            read_inputs(options(folder, **save, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        # Another record would be another sample from here on.
        (
            {"max_prompt_length": 200},
            r"--max-prompt-length .records .*then 7, now 8",
        ),
        ({"long_prompts": "truncate"}, r"--long-prompts .then 'drop', now 'truncate'"),
        (
            {"prompt_suffix_by_domain": {"default": " 7"}},
            r"--prompt-suffix-by-domain .then ",
        ),
    ],
)
def test_a_resumed_run_has_the_same_prompts(
    folder: Path, changes: dict[str, Any], message: str | None
) -> None:
    def read(config: Config) -> tuple[Config, Any]:
        inputs = read_inputs(config)
        return config.of_data(len(inputs.data)), inputs

    saved = resuming.resumable_config(*read(options(folder)))
    before = resuming.Resumption("run", "--save", Path("run"), saved, Progress())
    resumed = read(options(folder, **changes))
    if message is None:
        assert resuming.check_resumable(*resumed, before) == []
        return
    with pytest.raises(UserError, match=message):
        resuming.check_resumable(*resumed, before)
