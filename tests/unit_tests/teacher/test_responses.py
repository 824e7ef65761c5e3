"""The teacher's responses: generated once, kept through interruptions, mixed in by sample."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from megatron_dlm.config import Config
from megatron_dlm.data.response_store import ResponseStore
from megatron_dlm.models.model_provider import build_frozen_model
from megatron_dlm.parallel import ParallelGroups, initialized
from megatron_dlm.rollout.curriculum import teacher_response_fraction
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.teacher.given_responses import takes_given_response
from megatron_dlm.teacher.responses import generate_missing
from megatron_dlm.training.inputs import RunInputs, read_inputs
from megatron_dlm.training.run import build_run
from tests.tiny import run_config, run_training, save_random_model, write_data

PROMPTS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("responses")
    write_data(folder, PROMPTS)
    save_random_model(folder / "dense")
    return folder


def off_policy(folder: Path, save: Path, **options: Any) -> tuple[Config, RunInputs]:
    config = run_config(folder, folder / "dense", objective="off_policy", save=str(save), **options)
    return config, read_inputs(config)


def generate(config: Config, inputs: RunInputs, prompts_per_shard: int = 3) -> None:
    assert inputs.teacher is not None
    source, store = inputs.teacher.source, inputs.teacher.responses
    assert store is not None
    with initialized(config):
        teacher = build_frozen_model(source.architecture, config)
        source.load_into(teacher)
        generate_missing(
            config,
            store,
            inputs.data,
            range(PROMPTS),
            lambda: teacher,
            inputs.special_tokens,
            ParallelGroups.from_parallel_state(),
            prompts_per_shard,
        )


def stored(inputs: RunInputs) -> list[list[int]]:
    assert inputs.teacher is not None
    store = inputs.teacher.responses
    assert store is not None
    table = store.read()
    return [table[index].tolist() for index in range(len(table))]


def test_greedy_responses_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    config, inputs = off_policy(folder, tmp_path, temperature=0.0)
    generate(config, inputs)
    model = Qwen3ForCausalLM.from_pretrained(folder / "dense").eval()
    for prompt, response in zip(inputs.data, stored(inputs), strict=True):
        ids = prompt.token_ids[None]
        for token in response:
            with torch.no_grad():
                logits = model(ids).logits[0, -1]
            logits[inputs.special_tokens.mask_token_id] = -torch.inf
            assert int(logits.argmax()) == token
            ids = torch.cat((ids, torch.tensor([[token]])), dim=1)
        ended = response[-1] == inputs.special_tokens.eos_token_id
        assert ended or len(response) == config.rollout.max_response_length


def test_interrupted_generation_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = off_policy(folder, tmp_path / "whole")
    generate(*whole)
    config, inputs = off_policy(folder, tmp_path / "broken")
    write, written = ResponseStore.write, []

    def failing(self: ResponseStore, shard: range, responses: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        write(self, shard, responses)

    with monkeypatch.context() as patch:
        patch.setattr(ResponseStore, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            generate(config, inputs)
    assert inputs.teacher is not None
    store = inputs.teacher.responses
    assert store is not None
    assert written == [[0, 1], [2, 3, 4]]
    assert store.missing(range(PROMPTS)) == [5, 6, 7, 8, 9]
    kept = {file.name: file.stat().st_mtime_ns for file in store.folder.iterdir()}
    asked: list[int] = []
    rollout = RolloutEngine.generate

    def counting(self: RolloutEngine, prompts: Any, *args: Any) -> Any:
        asked.extend(prompt.sample_index for prompt in prompts)
        return rollout(self, prompts, *args)

    monkeypatch.setattr(RolloutEngine, "generate", counting)
    generate(config, read_inputs(config))
    assert asked == [5, 6, 7, 8, 9]
    assert kept.items() <= {f.name: f.stat().st_mtime_ns for f in store.folder.iterdir()}.items()
    assert stored(inputs) == stored(whole[1])
    generate(config, inputs)
    assert asked == [5, 6, 7, 8, 9]  # nothing is missing any more


def test_responses_of_another_run_are_refused_before_models_are_built(
    folder: Path, tmp_path: Path
) -> None:
    from megatron_dlm.errors import UserError

    config, inputs = off_policy(folder, tmp_path)
    generate(config, inputs)
    changed = dataclasses.replace(config.rollout, temperature=0.7)
    with pytest.raises(UserError, match=r"temperature = 1\.0, this run has 0\.7"):
        read_inputs(dataclasses.replace(config, rollout=changed))


def test_responses_belong_to_weights_and_not_to_a_folder(folder: Path, tmp_path: Path) -> None:
    from megatron_dlm.errors import UserError

    here, moved = tmp_path / "here", tmp_path / "moved"
    save_random_model(here)
    config, inputs = off_policy(folder, tmp_path / "run", teacher_load=str(here))
    generate(config, inputs)
    here.rename(moved)
    options: dict[str, Any] = dict(teacher_load=str(moved))
    assert stored(off_policy(folder, tmp_path / "run", **options)[1])
    save_random_model(moved, seed=1)  # trained again in place: files of the same names and sizes
    with pytest.raises(UserError, match=r"--teacher-responses = .*teacher_weights = "):
        off_policy(folder, tmp_path / "run", **options)
    save_random_model(moved)
    with pytest.raises(UserError, match=r"bf16 = False, this run has True"):
        off_policy(folder, tmp_path / "run", **options, bf16=True)


def test_sft_takes_the_teachers_responses_and_lets_the_teacher_go(
    folder: Path, tmp_path: Path
) -> None:
    config = run_config(
        folder,
        folder / "dense",
        objective="sft",
        prompts=str(folder / "prompts.jsonl"),
        train_data=None,
        max_response_length=16,
        save=str(tmp_path),
    )
    inputs = read_inputs(config)
    with initialized(config):
        run = build_run(config, inputs)
        samples = [(sample, record) for sample, record in enumerate(range(PROMPTS))]
        trajectories = run.source.trajectories(samples, 0)
    assert run.teacher is None
    assert [t.response_ids.tolist() for t in trajectories] == stored(inputs)
    assert all(not trajectory.is_rollout for trajectory in trajectories)
    eos = inputs.special_tokens.eos_token_id
    for trajectory in trajectories:
        ended = int(trajectory.response_ids[-1]) == eos
        assert trajectory.finish_reason == ("eos" if ended else "length")


def test_mixture_is_decided_by_the_sample(folder: Path, tmp_path: Path) -> None:
    config = run_config(folder, folder / "dense", teacher_response_fraction=0.5, save=str(tmp_path))
    inputs = read_inputs(config)
    with initialized(config):
        run = build_run(config, inputs)
        samples = run.sampler.samples(0, 20)
        trajectories = run.source.trajectories(samples, 0)
        part = run.source.trajectories(samples[1::3], 0)
    assert [t.sample_index for t in trajectories] == list(range(20))
    given = {t.sample_index for t in trajectories if not t.is_rollout}
    assert given == {g for g in range(20) if takes_given_response(config.data.seed, g, 0.5)}
    assert 0 < len(given) < 20
    responses = stored(inputs)
    for trajectory, (_, record) in zip(trajectories, samples, strict=True):
        if trajectory.sample_index in given:
            assert trajectory.response_ids.tolist() == responses[record]
    for trajectory, other in zip(part, trajectories[1::3], strict=True):
        assert torch.equal(trajectory.response_ids, other.response_ids)


@pytest.mark.slow
def test_mixture_trains_and_counts_only_the_students_forwards(folder: Path, tmp_path: Path) -> None:
    alone = run_training(run_config(folder, folder / "dense", save=str(tmp_path / "alone")))
    lines = {}
    for fraction in (0.5, 1.0):
        config = run_config(
            folder,
            folder / "dense",
            teacher_response_fraction=fraction,
            save=str(tmp_path / str(fraction)),
        )
        lines[fraction] = run_training(config)
        assert len(lines[fraction]) == 5
    mixed = lines[0.5][0]["tokens_per_forward"]  # about twice that, if all tokens were counted
    assert mixed == pytest.approx(alone[0]["tokens_per_forward"], rel=0.2)
    assert lines[1.0][0]["tokens_per_forward"] is None


def test_the_share_drawn_is_the_share_asked_for() -> None:
    for fraction in (0.0, 0.3, 1.0):
        share = sum(takes_given_response(7, g, fraction) for g in range(3000)) / 3000
        assert abs(share - fraction) < 0.03


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.8] * 5),
        ("linear", [0.8, 0.65, 0.5, 0.35, 0.2]),
        ("cosine", [0.8, 0.712132, 0.5, 0.287868, 0.2]),
    ],
)
def test_fraction_over_the_rollouts(schedule: str, expected: list[float]) -> None:
    config = Config.from_dict(
        dict(
            num_rollouts=5,
            teacher_response_fraction=0.8,
            final_teacher_response_fraction=0.2,
            teacher_response_fraction_schedule=schedule,
        )
    )
    fractions = [teacher_response_fraction(config, rollout) for rollout in range(5)]
    assert fractions == pytest.approx(expected, abs=1e-6)
    if schedule != "constant":
        # A longer run with the same schedule stays at its end.
        for first, stages in ((5, expected), (1, [0.8])):
            longer = Config.from_dict(
                {**config.to_dict(), "num_rollouts": 9, "teacher_response_fraction_rollouts": first}
            )
            fractions = [teacher_response_fraction(longer, rollout) for rollout in range(9)]
            assert fractions == pytest.approx(stages + [0.2] * (9 - first), abs=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.slow
def test_the_teacher_answers_what_the_run_takes_and_a_longer_run_the_rest(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    """Which records a run takes is asked of the run itself, batch by batch."""
    options: dict[str, Any] = dict(
        save=str(tmp_path),
        rollout_batch_size=2,
        global_batch_size=2,
        teacher_response_fraction=0.4,
        teacher_response_fraction_schedule=schedule,
    )
    asked: list[int] = []
    write = ResponseStore.write

    def watched(self: ResponseStore, prompts: Any, responses: Any) -> None:
        asked.extend(prompts)
        write(self, prompts, responses)

    monkeypatch.setattr(ResponseStore, "write", watched)
    taken: set[int] = set()
    for rollouts in (3, 10):
        before = set(asked)
        config = run_config(folder, folder / "dense", **options, num_rollouts=rollouts)
        with initialized(config):
            run = build_run(config, read_inputs(config))
            for rollout in range(rollouts):
                samples = run.sampler.samples(2 * rollout, 2)
                for trajectory, (_, record) in zip(
                    run.source.trajectories(samples, rollout), samples, strict=True
                ):
                    if not trajectory.is_rollout:
                        taken.add(record)
        assert len(asked) == len(set(asked))  # nothing is asked twice
        assert before < set(asked) == taken < set(range(PROMPTS))


def test_a_short_run_leaves_the_rest_of_the_file(folder: Path, tmp_path: Path) -> None:
    config, inputs = off_policy(folder, tmp_path, train_iters=3, global_batch_size=2)
    with initialized(config):
        run = build_run(config, inputs)
        used = {record for _, record in run.sampler.samples(0, 6)}
    answered = {index for index, ids in enumerate(stored(inputs)) if ids}
    assert answered == used
    assert len(used) == 6


def test_header_says_what_was_generated(folder: Path, tmp_path: Path) -> None:
    config, inputs = off_policy(folder, tmp_path)
    generate(config, inputs, PROMPTS)
    header = json.loads((tmp_path / "teacher_responses" / "header.json").read_text())
    assert header["prompts"] == inputs.data.file.fingerprint
    assert header["teacher"] == str((folder / "dense").resolve())
    assert header["num_prompts"] == PROMPTS
    assert (header["temperature"], header["max_response_length"]) == (1.0, 16)
