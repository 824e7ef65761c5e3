"""Objectives at random states against transformers in float64, and where they coincide."""

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.config import Config
from megatron_dlm.config.objective_traits import (
    OBJECTIVE_TRAITS,
    ObjectiveName,
    StateSelection,
)
from megatron_dlm.data.packing import pack
from megatron_dlm.models.model import head_weight
from megatron_dlm.objectives import OBJECTIVES
from megatron_dlm.objectives.base import LossInputs, Objective
from megatron_dlm.objectives.state_selection import SELECTORS, random_state
from megatron_dlm.types.teacher_targets import HiddenTargets
from megatron_dlm.types.trajectory import Trajectory
from tests.unit_tests.objectives.dense_reference import (
    EOS,
    MASK,
    VOCABULARY,
    Models,
    TokenLoss,
    as_decoding_shows,
    dense_loss,
    forward_kl,
    full_sequence,
    given_responses,
    masked_tokens,
    supervised_tokens,
    trajectories,
)

pytestmark = pytest.mark.usefixtures("single_process")


def make(name: ObjectiveName, **options: Any) -> Objective:
    config = Config.from_dict({"device": "cpu", "objective": name, **options})
    return OBJECTIVES[name](config, MASK, VOCABULARY)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_registry_and_configuration_know_the_same_objectives() -> None:
    assert set(get_args(ObjectiveName)) == set(OBJECTIVE_TRAITS) == set(OBJECTIVES)
    selections = {
        choice for traits in OBJECTIVE_TRAITS.values() for choice in traits.state_selections
    }
    assert selections == set(get_args(StateSelection)) == {*SELECTORS, "random"}


@st.composite
def cases(draw: st.DrawFn) -> tuple[ObjectiveName, list[Trajectory], dict[str, Any]]:
    name = draw(st.sampled_from(["opdlm_off", "off_policy", "sft"]))
    block_size = draw(st.integers(1, 5))
    options = dict(
        block_size=block_size,
        supervise_eos=draw(st.booleans()),
        loss_weighting=draw(st.sampled_from(["inverse_t", "none"])),
        divergence_chunk_size=draw(st.sampled_from([3, 64])),
    )
    strategy = trajectories if name == "opdlm_off" else given_responses
    return name, [draw(strategy(block_size)) for _ in range(draw(st.integers(1, 3)))], options


@settings(max_examples=30)
@given(cases())
def test_loss_equals_one_dense_forward_per_block(models: Models, case) -> None:
    name, batch, options = case
    objective = make(name, **options)
    if objective.config.traits.uses_teacher:
        models.teacher.annotate(batch)
    documents, expected, count = [], 0.0, 0
    for trajectory in batch:
        document = objective.document(trajectory, seeded())
        documents.append(document)
        trajectory = as_decoding_shows(trajectory, options["block_size"])
        supervised = supervised_tokens(trajectory, options["supervise_eos"])
        masked = masked_tokens(trajectory, document)
        position = torch.arange(len(masked))
        block = position // options["block_size"]
        _, t = random_state(position >= len(trajectory.prompt_ids), supervised, block, seeded())
        for b in set(block[supervised].tolist()):
            assert (masked & supervised & (block == b)).any()
        assert not masked[: len(trajectory.prompt_ids)].any()

        def cross_entropy(
            p: torch.Tensor, q: torch.Tensor, label: int, position: int, t: torch.Tensor = t
        ) -> torch.Tensor:
            return -q[label] / (t[position] if options["loss_weighting"] == "inverse_t" else 1)

        token_loss: TokenLoss = cross_entropy if name == "sft" else forward_kl
        size = options["block_size"]
        with torch.no_grad():
            sums = dense_loss(models, trajectory, size, masked, supervised, token_loss)
        weighted = name == "sft" and options["loss_weighting"] == "inverse_t"
        expected += float(sums[0])
        count += int(supervised.sum()) if weighted else sums[1]
    packed = pack(documents, pad_multiple=4)
    assert packed.loss_count == count
    assert models.loss(objective, packed) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(st.data())
def test_hard_targets_make_distillation_the_block_diffusion_loss(
    models: Models, data: st.DataObject
) -> None:
    """A teacher that is certain of x_0: forward KL is BD3-LM's cross entropy, gradient included."""
    block_size = data.draw(st.integers(1, 5))
    trajectory = data.draw(trajectories(block_size))
    distillation = make("opdlm_off", block_size=block_size)
    block_diffusion = make("sft", block_size=block_size, loss_weighting="none")
    document = distillation.document(trajectory, seeded())
    other = block_diffusion.document(trajectory, seeded())
    for name in ("token_ids", "block", "stream", "position", "supervised", "labels", "weights"):
        assert torch.equal(getattr(document, name), getattr(other, name)), name
    certain = torch.nn.functional.one_hot(document.labels, VOCABULARY).float()
    hidden = torch.randn(len(document.labels), 32, generator=seeded(data.draw(st.integers(0, 99))))
    head = head_weight(models.student).detach()
    results = []
    for objective, teacher in (
        (distillation, (HiddenTargets(certain), 1e4 * torch.eye(VOCABULARY))),
        (block_diffusion, (None, None)),
    ):
        leaf = hidden.clone().requires_grad_()
        loss, per_token = objective.loss(
            LossInputs(
                leaf,
                head,
                document.labels,
                document.weights,
                targets=teacher[0],
                teacher_head=teacher[1],
            )
        )
        loss.backward()
        results.append((loss.detach(), per_token, leaf.grad))
    for one, two in zip(*results, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)


@settings(max_examples=15)
@given(trajectories(1), st.sampled_from(["per_block", "global", "random"]))
def test_block_size_one_is_distillation_at_causal_visibility(
    models: Models, trajectory: Trajectory, selection: str
) -> None:
    """Each token is predicted from MASK in its place after the clean prefix, by causal attention.

    `global` draws one step of the whole trajectory: its current and all later tokens are masked.
    """
    trajectory.unmask_step = torch.ones_like(trajectory.unmask_step)  # a block takes one step
    models.teacher.annotate([trajectory])
    name: ObjectiveName = "opdlm_off" if selection == "random" else "opdlm"
    objective = make(name, block_size=1, state_selection=selection)
    document = objective.document(trajectory, seeded())
    prompt, full = len(trajectory.prompt_ids), full_sequence(trajectory)
    first = int(document.position[document.supervised].min())
    assert first == prompt or selection == "global"
    expected = 0.0
    with torch.no_grad():
        teacher = models.hf_teacher(full[None]).logits[0].log_softmax(-1)
        for i in range(first, len(full)):
            seen = torch.cat((full[:i], torch.tensor([MASK])))
            q = models.hf_student(seen[None]).logits[0, -1].log_softmax(-1)
            expected += float(forward_kl(teacher[i - 1], q, int(full[i]), i))
    batch = pack([document])
    assert batch.loss_count == len(full) - first
    assert models.loss(objective, batch) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@settings(max_examples=10)
@given(trajectories(4))
def test_one_block_without_prompt_is_whole_sequence_diffusion(
    models: Models, trajectory: Trajectory
) -> None:
    """Everything is masked with one t and sees everything: a masked model with full attention."""
    ids = full_sequence(trajectory)
    trajectory = Trajectory(0, ids[:0], ids, torch.zeros_like(ids), finish_reason="length")
    objective = make("sft", block_size=len(ids))
    document = objective.document(trajectory, seeded())
    masked = masked_tokens(trajectory, document)
    assert len(document.token_ids) == len(ids)
    with torch.no_grad():
        bias = torch.zeros(1, 1, len(ids), len(ids), dtype=torch.float64)
        state = ids.masked_fill(masked, MASK)
        q = models.hf_student(state[None], attention_mask=bias).logits[0].log_softmax(-1)
    everything = torch.ones_like(masked)
    _, t = random_state(everything, everything, torch.zeros_like(ids), seeded())
    expected = sum(float(-q[i, ids[i]] / t[i]) for i in masked.nonzero()[:, 0])
    assert models.loss(objective, pack([document])) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(st.data())
def test_a_given_response_in_a_mixture_gets_random_states(data: st.DataObject) -> None:
    block_size = data.draw(st.integers(1, 5))
    trajectory = data.draw(given_responses(block_size))
    document = make("opdlm", block_size=block_size).document(trajectory, seeded())
    other = make("off_policy", block_size=block_size).document(trajectory, seeded())
    assert torch.equal(document.token_ids, other.token_ids)
    assert torch.equal(document.supervised, other.supervised)


@pytest.mark.parametrize(("finish_reason", "filler"), [("eos", EOS), ("length", MASK)])
@pytest.mark.parametrize("name", ["sft", "off_policy", "opdlm", "opdlm_off"])
def test_the_last_block_of_a_given_response_is_whole(
    name: ObjectiveName, finish_reason: Any, filler: int
) -> None:
    """As decoding shows it: what lies after the end says nothing of where the end is."""
    end = EOS if finish_reason == "eos" else 6
    trajectory = Trajectory(
        0,
        torch.tensor([1, 2, 3]),
        torch.tensor([4, 5, end]),
        torch.zeros(3, dtype=torch.int64),
        finish_reason=finish_reason,
    )
    shown = set()
    for seed in range(40):
        document = make(name, block_size=4).document(trajectory, seeded(seed))
        noisy = document.stream == 1
        # The grid is that of token 0: block 0 holds the prompt and one response token.
        assert document.position[noisy].tolist() == list(range(8))
        assert document.block[noisy].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
        tokens = document.token_ids[noisy].tolist()
        assert tokens[:4] == [1, 2, 3, MASK]
        shown.update(tokens[6:])
        # Never supervised, and never in the clean stream, which no later block reads.
        assert document.position[document.supervised].max() <= 5
        assert document.position[document.stream == 0].tolist() == [0, 1, 2, 3]
    assert shown == {filler, MASK}


@given(st.data())
def test_training_rows_of_given_responses_hold_whole_blocks(data: st.DataObject) -> None:
    block_size = data.draw(st.integers(1, 17))
    trajectory = data.draw(given_responses(block_size))
    name = data.draw(st.sampled_from(["sft", "off_policy", "opdlm", "opdlm_off"]))
    document = make(name, block_size=block_size).document(trajectory, seeded())
    for stream in document.stream.unique():
        own = document.position[document.stream == stream]
        assert (own[:, None] // block_size == own // block_size).sum(0).unique().tolist() in (
            [],
            [block_size],
        )
    assert (document.labels == MASK).sum() == 0
