"""The d-OPSD loss against transformers in float64: one forward a state, dense masks."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dlm.config import Config
from megatron_dlm.data.packing import empty_row, pack
from megatron_dlm.objectives import OBJECTIVES
from megatron_dlm.objectives.base import Objective
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.visited_states import states_before_last_block
from megatron_dlm.teacher.self_teacher import SelfTeacher, teacher_view
from megatron_dlm.types.diffusion_kind import RND1, DiffusionKind
from megatron_dlm.types.document import Document
from megatron_dlm.types.trajectory import Trajectory
from tests.unit_tests.objectives.dense_reference import (
    MASK,
    VOCABULARY,
    Models,
    full_sequence,
    trajectories,
)

pytestmark = pytest.mark.usefixtures("single_process")
KINDS = [
    DiffusionKind("block_causal", shifted=False),
    DiffusionKind("full", shifted=False),
    RND1,
]


@dataclass(frozen=True)
class Case:
    """A configuration and rollouts of some kind of diffusion model."""

    config: Config
    diffusion_kind: DiffusionKind
    batch: list[Trajectory]

    def objective(self) -> Objective:
        return OBJECTIVES["d_opsd"](self.config, MASK, VOCABULARY, self.diffusion_kind)

    def annotate(self, models: Models) -> None:
        """The frozen copy is another model here, so that nobody's part can be mixed up."""
        SelfTeacher(
            models.teacher.model,
            self.config,
            mask_token_id=MASK,
            vocab_size=VOCABULARY,
            shifted=self.diffusion_kind.shifted,
            groups=ParallelGroups(),
        ).annotate(self.batch)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block_size = draw(st.integers(1, 4))
    kind = draw(st.sampled_from(KINDS))
    options: dict[str, Any] = dict(
        objective="d_opsd",
        teacher_load="a frozen copy",
        block_size=block_size,
        reveal_fraction=draw(st.sampled_from([0.0, 0.25, 1.0])),
        positions_per_state=draw(st.integers(1, 3)),
        position_ranking=draw(st.sampled_from(["probability", "logit"])),
        teacher_top_k=draw(st.sampled_from([1, 5, 20])),
        divergence_term_limit=draw(st.sampled_from([0.05, 10.0])),
        divergence_chunk_size=draw(st.sampled_from([3, 64])),
    )
    if draw(st.booleans()):
        options["micro_batch_size"] = draw(st.integers(1, 2))
    else:
        options["max_tokens_per_micro_batch"] = draw(st.sampled_from([1, 20, 100]))
    batch = [draw(trajectories(block_size)) for _ in range(draw(st.integers(1, 3)))]
    for trajectory in batch:
        trajectory.correct = draw(st.booleans())
        if kind.attention_pattern == "full" and draw(st.booleans()):
            trajectory.canvas_length = len(full_sequence(trajectory)) + draw(st.integers(0, 5))
    return Case(Config.from_dict({"device": "cpu", **options}), kind, batch)


def dense_logits(model: torch.nn.Module, ids: Tensor, visible: Tensor) -> Tensor:
    """Logits [S, V] of ids [S] under a dense mask [S, S]."""
    bias = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)
    with torch.no_grad():
        logits: Tensor = model(ids[None], attention_mask=bias[None, None]).logits[0]
    return logits


def visited(trajectory: Trajectory, block_size: int) -> list[tuple[Tensor, list[int]]]:
    """(canvas [C], masked positions of the block in decoding) of every state that counts."""
    full = full_sequence(trajectory)
    prompt = len(trajectory.prompt_ids)
    steps = torch.cat((trajectory.unmask_step, trajectory.tail_unmask_step)).tolist()
    steps = [0] * prompt + steps
    length = max(len(full), trajectory.canvas_length or 0)
    states = []
    for start in range(0, (len(full) - 1) // block_size * block_size, block_size):
        block = range(start, start + block_size)
        for step in range(1, max(steps[i] for i in block) + 1):
            masked = [i for i in block if steps[i] >= step]
            canvas = torch.full((length,), MASK)
            canvas[: start + block_size] = full[: start + block_size]
            canvas[masked] = MASK
            states.append((canvas, masked))
    return states


def dense_loss(models: Models, case: Case) -> tuple[float, int, int]:
    """Loss sum, states and predictions by the definition; one forward a state and model."""
    options = case.config.self_distillation
    block_size = case.config.model.block_size
    shift = int(case.diffusion_kind.shifted)
    total, num_states, predictions = 0.0, 0, 0
    for trajectory in case.batch:
        if not trajectory.correct:
            continue
        states = states_before_last_block(trajectory, block_size)
        views = teacher_view(
            trajectory,
            states,
            fraction=options.reveal_fraction,
            mask_token_id=MASK,
            seed=case.config.data.seed,
        )
        for view, (canvas, masked) in zip(views, visited(trajectory, block_size), strict=True):
            length = len(canvas)
            everything = torch.ones(length, length, dtype=torch.bool)
            logits = dense_logits(models.hf_teacher, view, everything)
            teacher = logits.log_softmax(-1)
            if case.diffusion_kind.attention_pattern == "full":
                student = dense_logits(models.hf_student, canvas, everything)
            else:
                block = torch.arange(length) // block_size
                visible = block[None, :] <= block[:, None]
                student = dense_logits(models.hf_student, canvas, visible)
            rank_by = logits if options.position_ranking == "logit" else teacher
            surest = sorted(masked, key=lambda i, r=rank_by: -float(r[i - shift].max()))
            for i in surest[: options.positions_per_state]:
                top = teacher[i - shift].topk(options.teacher_top_k)
                p = top.values.exp() / top.values.exp().sum()
                q = student[i - shift][top.indices].softmax(-1)
                terms = q * (q / p).log()
                total += float(terms.clamp(max=options.divergence_term_limit).sum())
                predictions += 1
            num_states += 1
    return total, num_states, predictions


@settings(max_examples=40)
@given(cases())
def test_loss_equals_dense_forwards(models: Models, case: Case) -> None:
    case.annotate(models)
    objective = case.objective()
    documents = [objective.document(t, torch.Generator()) for t in case.batch]
    packed = pack(documents, pad_multiple=4)
    total, num_states, predictions = dense_loss(models, case)
    assert packed.loss_count == num_states
    assert len(packed.supervised) == predictions
    assert models.loss(objective, packed) == pytest.approx(total, rel=1e-4, abs=1e-5)
    check_rows(models, objective, documents, total, num_states)


def check_rows(
    models: Models, objective: Objective, documents: list[Document], total: float, num_states: int
) -> None:
    """Rows of micro-batches add up to all documents; under a budget they are short."""
    rows = objective.rows(documents, pad_multiple=4)
    assert sum(row.loss_count for row in rows) == num_states
    assert sum(models.loss(objective, row) for row in rows) == pytest.approx(
        total, rel=1e-4, abs=1e-5
    )
    limit = objective.config.training.max_tokens_per_micro_batch
    for row in rows:
        text = row.row.attention[0][row.row.attention[0] >= 0]  # type: ignore[index]
        assert torch.equal(text.unique(), torch.arange(len(text.unique())))
        assert limit is None or len(text) <= limit or len(text.unique()) == 1
    empty = empty_row(rows[0], pad_multiple=4)
    assert (empty.loss_count, models.loss(objective, empty)) == (0, 0.0)


@settings(max_examples=20)
@given(cases())
def test_a_mean_of_rows_is_over_those_with_states(models: Models, case: Case) -> None:
    case.annotate(models)
    objective = case.objective()
    documents = [objective.document(t, torch.Generator()) for t in case.batch]
    packed = pack(documents, row_mean=True)
    rows = [dense_loss(models, replace(case, batch=[t])) for t in case.batch]
    means = [total / num_states for total, num_states, _ in rows if num_states]
    assert packed.loss_count == len(means)
    assert models.loss(objective, packed) == pytest.approx(sum(means), rel=1e-4, abs=1e-5)


@given(cases())
def test_teacher_sees_the_states_and_a_share_of_what_came_later(case: Case) -> None:
    fraction = case.config.self_distillation.reveal_fraction
    block_size = case.config.model.block_size
    for trajectory in case.batch:
        full = full_sequence(trajectory)
        states = states_before_last_block(trajectory, block_size)
        views = [
            teacher_view(trajectory, states, fraction=fraction, mask_token_id=MASK, seed=seed)
            for seed in (1, 1, 2)
        ]
        assert torch.equal(views[0], views[1])
        if 0 < fraction < 1 and len(states) * len(full) > 200:
            assert not torch.equal(views[0], views[2])
        for view, (canvas, masked) in zip(views[0], visited(trajectory, block_size), strict=True):
            later = (masked[0] // block_size + 1) * block_size
            assert torch.equal(view[:later], canvas[:later])
            revealed = [i for i in range(later, len(canvas)) if int(view[i]) != MASK]
            assert len(revealed) == math.ceil(fraction * (len(full) - later))
            assert all(int(view[i]) == int(full[i]) for i in revealed)


def test_wrong_responses_and_single_blocks_are_not_trained_on(models: Models) -> None:
    config = Config.from_dict(
        {"device": "cpu", "objective": "d_opsd", "teacher_load": "a", "block_size": 2}
    )
    response = torch.tensor([5, 6, 7, 8])
    wrong = Trajectory(0, torch.tensor([1, 2]), response, torch.ones(4).long(), correct=False)
    short = Trajectory(1, torch.tensor([1, 2]), response[:2], torch.ones(2).long(), correct=True)
    case = Case(config, KINDS[0], [wrong, short])
    case.annotate(models)
    documents = [case.objective().document(t, torch.Generator()) for t in case.batch]
    packed = pack(documents, pad_multiple=4)
    assert packed.loss_count == pack(documents, row_mean=True).loss_count == 0
    assert models.loss(case.objective(), packed) == 0.0
