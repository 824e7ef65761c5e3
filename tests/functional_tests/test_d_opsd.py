"""Self-distillation as a user runs it: it resumes, passes on its weights, and improves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_dlm.commands import main
from megatron_dlm.data.packing import pack
from megatron_dlm.data.prompts import PromptDataset
from megatron_dlm.models.forward import forward_hidden
from megatron_dlm.models.model import head_weight
from megatron_dlm.objectives.base import LossInputs
from megatron_dlm.parallel import initialized
from megatron_dlm.training import loop
from megatron_dlm.training.inputs import read_inputs
from megatron_dlm.training.loop import train
from megatron_dlm.training.run import Run, build_run
from megatron_dlm.training.verified_rollout import TRY_STRIDE
from megatron_dlm.types.trajectory import Trajectory
from tests.tiny import (
    REPOSITORY,
    declare_diffusion_kind,
    reward_every_third,
    run_config,
    run_training,
    save_random_model,
    write_data,
)

ROLLOUTS = dict(objective="d_opsd", num_rollouts=3, rollout_batch_size=8)


class Interrupted(Exception):
    """Stands for a node that dies."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("d_opsd")
    write_data(folder)
    save_random_model(folder / "model")
    declare_diffusion_kind(folder / "model", "block_causal", shifted=False)
    save_random_model(folder / "full")
    declare_diffusion_kind(folder / "full", "full", shifted=True)
    return folder


def _run(folder: Path, load: Path, save: Path, **options: Any) -> list[dict[str, Any]]:
    config = run_config(folder, load, save=str(save), **{**ROLLOUTS, **options})
    with reward_every_third():
        lines = run_training(config)
    return [
        {key: value for key, value in line.items() if key not in ("time", "throughput")}
        for line in lines
    ]


def _interrupt_after(monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    train_step = loop.train_step

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal updates
        if updates == 0:
            raise Interrupted
        updates -= 1
        return train_step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", failing)


def _exported(run: Path, target: Path) -> dict[str, torch.Tensor]:
    command = ["convert", "--load", str(run), "--save", str(target)]
    assert main([*command, "--target-format", "a2d-qwen3"]) == 0
    return load_file(target / "model.safetensors")


@pytest.mark.parametrize("adapters", [True, False])
def test_resumed_equals_uninterrupted_bit_for_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapters: bool
) -> None:
    model = folder / "model"
    options: dict[str, Any] = dict(lora_rank=3, use_distributed_optimizer=True)
    if not adapters:
        options = dict(teacher_load=str(model))
    options["max_response_length"] = 8
    expected = _run(folder, model, tmp_path / "whole", **options)
    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 5)
        with pytest.raises(Interrupted):
            _run(folder, model, broken, save_interval=1, **options)
    assert _run(folder, broken, broken, **options) == expected
    weights = _exported(broken, tmp_path / "broken_hf")
    for name, tensor in _exported(tmp_path / "whole", tmp_path / "whole_hf").items():
        assert torch.equal(weights[name], tensor), name


def test_shorter_rows_train_alike(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[list[int]] = []
    train_step = loop.train_step

    def watched(*args: Any) -> Any:
        lengths.append([len(batch.row.token_ids) for batch in args[4]])
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", watched)
    options: dict[str, Any] = dict(lora_rank=3, num_rollouts=1)
    whole = _run(folder, folder / "full", tmp_path / "whole", micro_batch_size=2, **options)
    budget = dict(micro_batch_size=1, max_tokens_per_micro_batch=300)
    cut = _run(folder, folder / "full", tmp_path / "cut", **budget, **options)
    together, apart = lengths[: len(whole)], lengths[len(whole) :]
    assert max(map(max, together)) > 300 >= max(map(max, apart))
    assert list(map(sum, together)) == list(map(sum, apart))
    for line, other in zip(cut, whole, strict=True):
        for key in ("loss", "grad_norm"):
            assert line.pop(key) == pytest.approx(other.pop(key), rel=1e-4)
        # Of tokens of the first row alone, which is another one.
        assert line.pop("student_entropy") == pytest.approx(other.pop("student_entropy"), rel=0.05)
        assert line == other


def test_a_new_run_starts_from_the_merged_weights(folder: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    _run(folder, folder / "model", first, lora_rank=3)
    merged = _exported(first, tmp_path / "merged")
    before = load_file(folder / "model" / "model.safetensors")
    assert any(not torch.equal(merged[name], tensor) for name, tensor in before.items())
    # Adapters start anew, with nothing learnt: the first loss is that of the exported weights.
    options: dict[str, Any] = dict(num_rollouts=1, lora_rank=2)
    again = _run(folder, first, tmp_path / "second", finetune=True, **options)
    exported = _run(folder, tmp_path / "merged", tmp_path / "third", **options)
    assert again == exported


def _rewrite(file: Path, changes: Callable[[int], dict[str, str]]) -> None:
    """Change fields of each record, by its number."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [json.dumps(record | changes(i)) + "\n" for i, record in enumerate(records)]
    file.write_text("".join(lines))


def _guessing_model(folder: Path) -> Path:
    """A diffusion model that answers every problem with 1, 2 or 3, no matter what."""
    _rewrite(folder / "examples.jsonl", lambda i: {"response": f"1 + 2 = 3\n#### {1 + i % 3}"})
    start = save_random_model(folder / "random")
    options: dict[str, Any] = dict(train_iters=60, lr=3e-2, min_lr=3e-3, adam_beta2=0.95)
    options |= dict(global_batch_size=16, micro_batch_size=16, loss_weighting="none")
    save = str(folder / "guessing")
    run_training(run_config(folder, start, objective="sft", save=save, **options))
    return Path(save)


def _is_right(response: str, answer: str) -> bool:
    """Whether the last #### of the response is followed by what an answer ends with."""
    _, mark, given = response.rpartition("#### ")
    return mark != "" and given.strip() == answer.split()[-1]


def test_accuracy_is_that_of_the_answers(tmp_path: Path) -> None:
    """With the reward of real runs: every try is decoded again and scored by another hand."""
    write_data(tmp_path)
    model = _guessing_model(tmp_path)
    # As it is, as in GSM8K, and one that the model never gives.
    answers = ("1", "5 - 3 = 2\n#### 2", "9 - 5 = 4\n#### 4")
    _rewrite(tmp_path / "prompts.jsonl", lambda i: {"answer": answers[i % 3]})
    prompts, tries = 24, 3
    config = run_config(
        tmp_path,
        model,
        objective="d_opsd",
        finetune=True,
        lora_rank=2,
        max_tries=tries,
        rollout_batch_size=prompts,
        shuffle=False,
        save=str(tmp_path / "run"),
    )
    inputs = read_inputs(config)
    assert isinstance(inputs.data, PromptDataset)
    right = []
    with initialized(config):
        run = build_run(config, inputs)
        assert run.source.engine is not None
        for number in range(tries):
            samples = [inputs.data.sample(i, i + number * TRY_STRIDE) for i in range(prompts)]
            responses = run.source.engine.generate(samples, config.rollout.max_response_length)
            texts = [
                str(inputs.tokenizer.decode(response.response_ids, skip_special_tokens=True))
                for response in responses
            ]
            right.append([_is_right(text, answers[i % 3]) for i, text in enumerate(texts)])
        train(run)
    accuracy, solved = sum(right[0]) / prompts, sum(map(any, zip(*right, strict=True))) / prompts
    assert 0 < accuracy < solved < 1
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        assert (metrics["accuracy"], metrics["solved_rate"]) == (accuracy, solved)
        assert metrics["supervised_tokens"] > 0


def _loss(run: Run, trajectories: list[Trajectory]) -> float:
    """Mean loss of a state, at the run's present weights."""
    documents = [run.objective.document(t, torch.Generator()) for t in trajectories]
    batch = pack(documents)
    model = run.student.model.eval()
    hidden = forward_hidden(model, [batch.row])
    assert hidden is not None
    with torch.no_grad():
        loss, _ = run.objective.loss(
            LossInputs(
                hidden=hidden[0][batch.supervised],
                head=head_weight(model),
                labels=batch.labels,
                weights=batch.weights,
                targets=batch.targets,
            )
        )
    return float(loss) / batch.loss_count


def test_it_comes_closer_to_its_teacher_on_held_out_problems(tmp_path: Path) -> None:
    """Held-out responses of the untrained student, their states and targets stay the same."""
    write_data(tmp_path, num=96)
    converted = tmp_path / "converted"
    sft = dict(objective="sft", train_iters=30, global_batch_size=16, micro_batch_size=8)
    tiny = REPOSITORY / "examples" / "tiny" / "qwen3"
    run_training(run_config(tmp_path, tiny, save=str(converted), **sft))
    config = run_config(
        tmp_path,
        converted,
        objective="d_opsd",
        finetune=True,
        lora_rank=8,
        num_rollouts=4,
        rollout_batch_size=16,
        global_batch_size=4,
        micro_batch_size=4,
        max_response_length=24,
        lr=3e-3,
        save=str(tmp_path / "run"),
    )
    inputs = read_inputs(config)
    with reward_every_third(), initialized(config):
        run = build_run(config, inputs)
        assert run.teacher is not None
        # Training takes the first 64 samples of the epoch; these records come last in it.
        held_out = run.source.trajectories(run.sampler.samples(80, 16), rollout=0)
        run.teacher.annotate(held_out)
        before = _loss(run, held_out)
        train(run)
        after = _loss(run, held_out)
    assert before > 0
    assert after < 0.8 * before, (before, after)
