"""Each objective lowers its own loss on held-out prompts, at states that stay fixed.

A minute of training turns no model into a good one: what is tested is that data, states, targets
and updates of an objective point the same way.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from megatron_dlm.config import Config, validate
from megatron_dlm.data.packing import pack
from megatron_dlm.models.model import head_weight, read_hidden_states
from megatron_dlm.objectives.base import LossInputs
from megatron_dlm.parallel import initialized
from megatron_dlm.seeding import keyed_generator
from megatron_dlm.training.inputs import read_inputs
from megatron_dlm.training.loop import train
from megatron_dlm.training.rollout_batch import collect
from megatron_dlm.training.run import Run, build_run
from megatron_dlm.types.trajectory import Trajectory
from tests.corpora import write_corpus
from tests.tiny import REPOSITORY, TOKENIZER, run_config, write_data

MODEL = REPOSITORY / "examples" / "tiny" / "qwen3"
HELD_OUT = 32

LENGTHS: dict[str, Any] = dict(max_prompt_length=64, max_response_length=40)
GENERATED: dict[str, Any] = dict(LENGTHS, max_running_requests=64)
ROLLOUTS = dict(GENERATED, num_rollouts=3, rollout_batch_size=32, epochs_per_rollout=4)
UPDATES: dict[str, Any] = dict(train_iters=48)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "opdlm": ROLLOUTS,
    "opdlm_off": ROLLOUTS,
    "off_policy": dict(UPDATES, **GENERATED),
    "sft": dict(UPDATES, **LENGTHS),
    "scp": dict(UPDATES, seq_length=128),
    "next_token": dict(
        UPDATES,
        **LENGTHS,
        load=None,
        model_config=str(MODEL / "config.json"),
        tokenizer=str(TOKENIZER),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders with problems to train on, and with others."""
    train, held_out = (tmp_path_factory.mktemp(name) for name in ("train", "held_out"))
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    for folder, num, split in ((train, 128, "train"), (held_out, HELD_OUT, "heldout")):
        _, examples = write_data(folder, num, split=split)
        texts = [json.loads(line)["response"] for line in examples.read_text().splitlines()]
        write_corpus(folder / "corpus", [tokenizer.encode(text) for text in texts])
    return train, held_out


def config_of(folder: Path, objective: str, **changes: Any) -> Config:
    options = dict(
        objective=objective,
        save=str(folder / objective),
        global_batch_size=8,
        micro_batch_size=8,
        min_lr=1e-4,
        lr_warmup_iters=8,
        divergence_chunk_size=256,
    )
    return run_config(folder, MODEL, **{**options, **OBJECTIVES[objective], **changes})


def held_out_trajectories(folder: Path, objective: str) -> list[Trajectory]:
    """What the objective would train on at its first step, were these its prompts."""
    changes = dict(global_batch_size=HELD_OUT, lr_warmup_iters=0)
    if "num_rollouts" in OBJECTIVES[objective]:
        changes["rollout_batch_size"] = HELD_OUT
    config = config_of(folder, objective, **changes)
    return collect(build_run(config, read_inputs(config))).trajectories


@torch.no_grad()
def loss_on(run: Run, trajectories: list[Trajectory]) -> float:
    """The loss as training divides it, at states drawn by the trajectory's index alone."""
    if run.teacher is not None:
        run.teacher.annotate(trajectories)
    batch = pack(
        [run.objective.document(t, keyed_generator(0, t.sample_index)) for t in trajectories]
    )
    output = run.student.model(
        input_ids=batch.row.token_ids[None],
        position_ids=batch.row.position_ids[None],
        attention_mask=batch.row.attention,
        read=batch.supervised,
    )
    loss, _ = run.objective.loss(
        LossInputs(
            hidden=read_hidden_states(run.student.model, output, batch.supervised),
            head=head_weight(run.student.model),
            labels=batch.labels,
            weights=batch.weights,
            targets=batch.targets,
            teacher_head=run.teacher.head if run.teacher is not None else None,
        )
    )
    return float(loss) / batch.loss_count


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_held_out_loss_falls(folders: tuple[Path, Path], objective: str) -> None:
    config = config_of(folders[0], objective)
    validate(config, 1)
    with initialized(config):
        trajectories = held_out_trajectories(folders[1], objective)
        run = build_run(config, read_inputs(config))
        before = loss_on(run, [dataclasses.replace(t) for t in trajectories])
        train(run)
        after = loss_on(run, trajectories)
    assert run.progress.iteration == 48
    assert after < 0.5 * before
