"""Figures of rollouts and updates against sums written out."""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dlm.data.packing import TrainingBatch
from megatron_dlm.distillation.vocab_parallel_entropy import vocab_parallel_entropy
from megatron_dlm.models.forward import Row
from megatron_dlm.objectives.base import LossInputs, Objective
from megatron_dlm.training import update_figures
from megatron_dlm.training.rollout_figures import LENGTH_BINS, STEPS, RolloutFigures
from megatron_dlm.types.diffusion_kind import BLOCK_DIFFUSION, RND1, DiffusionKind
from megatron_dlm.types.trajectory import Trajectory
from tests.tiny import run_config, run_training, save_random_model, write_data

BLOCK = 4


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    """A response and its tail; in each block tokens are committed in some order."""
    prompt, length = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    tail = -(prompt + length) % BLOCK
    steps = draw(st.lists(st.integers(1, 3), min_size=length + tail, max_size=length + tail))
    ids = torch.arange(length)
    return Trajectory(
        0,
        torch.arange(prompt),
        ids,
        torch.tensor(steps[:length]),
        torch.arange(tail),
        torch.tensor(steps[length:], dtype=torch.int64),
    )


@given(st.lists(trajectories(), min_size=1, max_size=4))
def test_lengths_and_tokens_by_step(found: list[Trajectory]) -> None:
    figures = RolloutFigures(40, BLOCK)
    sums = [float(count) for count in figures.counts(found)]
    assert len(sums) == figures.SIZE
    lengths = figures.lengths(sums)
    assert lengths.bin_width == 3
    for i, count in enumerate(lengths.counts):
        inside = range(3 * i + 1, 3 * i + 4)
        assert count == sum(len(t.response_ids) in inside for t in found)
    commits: dict[tuple[int, int, int], int] = defaultdict(int)  # of each forward
    for i, trajectory in enumerate(found):
        steps = [*trajectory.unmask_step.tolist(), *trajectory.tail_unmask_step.tolist()]
        for position, step in enumerate(steps, start=len(trajectory.prompt_ids)):
            commits[i, position // BLOCK, step] += 1
    expected = []
    for step in (1, 2, 3):
        of_step = [count for (_, _, s), count in commits.items() if s == step]
        expected += [sum(of_step) / len(of_step)] if of_step else []
    assert figures.tokens_by_step(sums) == pytest.approx(expected)


def test_responses_that_were_given_have_no_steps() -> None:
    given_response = Trajectory(0, torch.arange(3), torch.arange(50), torch.zeros(50).long())
    figures = RolloutFigures(40, BLOCK)
    counts = figures.counts([given_response])
    assert counts[LENGTH_BINS - 1] == 1  # longer ones are in the last
    assert counts[LENGTH_BINS:] == [0] * 2 * STEPS
    assert figures.tokens_by_step(counts) is None
    assert figures.counts([]) == [0] * figures.SIZE


@pytest.mark.parametrize("kind", [BLOCK_DIFFUSION, DiffusionKind("block_causal", True), RND1])
def test_losses_by_position_and_entropy(kind: Any) -> None:
    torch.manual_seed(0)
    tokens, hidden_size, vocabulary = 150, 8, 40
    position = torch.arange(200)
    supervised = torch.randperm(200)[:tokens].sort().values
    batch = TrainingBatch(
        Row(position, position, torch.stack([position] * 4).int()),
        supervised,
        supervised,
        torch.ones(tokens),
        None,
        tokens,
    )
    hidden = torch.randn(tokens, hidden_size, dtype=torch.float64)
    head = torch.randn(vocabulary + 5, hidden_size, dtype=torch.float64)
    inputs = LossInputs(hidden, head, supervised, torch.ones(tokens))
    losses = torch.rand(tokens, dtype=torch.float64)
    config = SimpleNamespace(diffusion_kind=kind, model=SimpleNamespace(block_size=BLOCK))
    objective = cast(
        Objective, SimpleNamespace(config=config, diffusion_kind=kind, vocab_size=vocabulary)
    )
    sums = update_figures.measured(objective, batch, inputs, losses, with_entropy=True).tolist()
    predicted = supervised + int(kind.shifted)
    expected = [float(losses[predicted % BLOCK == place].mean()) for place in range(BLOCK)]
    by_position = update_figures.loss_by_position(objective, sums)
    assert by_position == (None if kind is RND1 else pytest.approx(expected))
    q = torch.softmax(hidden @ head[:vocabulary].T, dim=-1)
    entropies = -(q * q.log()).sum(-1)
    torch.testing.assert_close(vocab_parallel_entropy(hidden, head, vocabulary), entropies)
    assert update_figures.entropy(sums) == pytest.approx(float(entropies[::3].mean()))


def test_a_run_has_them_and_writes_samples_and_a_report(tmp_path: Path) -> None:
    write_data(tmp_path)
    model = save_random_model(tmp_path / "model")
    line = run_training(run_config(tmp_path, model))[-1]
    # Every supervised token has a place: the mean over places lies between the extremes.
    assert len(line["loss_by_position"]) == 4
    assert min(line["loss_by_position"]) <= line["loss"] <= max(line["loss_by_position"])
    assert 0 < line["student_entropy"] < torch.tensor(512.0).log()
    assert 1 <= min(line["tokens_by_step"]) <= max(line["tokens_by_step"]) <= 4
    assert sum(line["response_lengths"]["counts"]) == 20
    samples = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 2
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Loss by place in the block" in page
    assert '<td class="event">finished</td>' in page
