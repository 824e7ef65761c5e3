"""Two modes in one forward, loss and gradient, against transformers in float64.

The diffusion mode one forward a block under a dense mask, the autoregressive mode as transformers
runs any such model.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dlm.config import Config
from megatron_dlm.config.objective_traits import ObjectiveName
from megatron_dlm.data.packing import TrainingBatch, pack
from megatron_dlm.distillation.vocab_parallel_top_k import vocab_parallel_top_k
from megatron_dlm.models.model import head_weight
from megatron_dlm.objectives import OBJECTIVES
from megatron_dlm.objectives.base import LossInputs, Objective
from megatron_dlm.objectives.state_selection import random_state
from megatron_dlm.types.teacher_targets import HiddenTargets
from megatron_dlm.types.trajectory import Trajectory
from tests.unit_tests.objectives.dense_reference import (
    MASK,
    VOCABULARY,
    Models,
    as_decoding_shows,
    dense_causal_loss,
    dense_loss,
    forward_kl,
    given_responses,
    masked_tokens,
    supervised_tokens,
    trajectories,
)

pytestmark = pytest.mark.usefixtures("single_process")

K = 6
CASES: dict[str, dict[str, Any]] = {
    "opdlm": dict(state_selection="all"),
    "opdlm_off": dict(loss_normalization="row_mean"),
    "off_policy": dict(divergence_top_k=K),
    "off_policy stored": dict(divergence_top_k=K, cache_teacher_targets=True),
    "sft": dict(loss_weighting="inverse_t"),
}


def top_k_kl(p: Tensor, q: Tensor, label: int, position: int) -> Tensor:
    """Forward KL over the teacher's K most likely tokens and one class of all others."""
    values, tokens = p.topk(K)
    p_rest = torch.log1p(-values.exp().sum())
    q_rest = torch.log1p(-q[tokens].exp().sum())
    p_all, q_all = torch.cat((values, p_rest[None])), torch.cat((q[tokens], q_rest[None]))
    return forward_kl(p_all, q_all, label, position)


def cross_entropy(p: Tensor, q: Tensor, label: int, position: int) -> Tensor:
    return -q[label]


def annotate(models: Models, batch: list[Trajectory], *, stored: bool) -> None:
    models.teacher.annotate(batch)
    for trajectory in batch if stored else ():
        assert isinstance(trajectory.targets, HiddenTargets)
        trajectory.targets, _ = vocab_parallel_top_k(
            trajectory.targets.hidden, models.teacher.head, K, VOCABULARY
        )


def gradient(models: Models, objective: Objective, batch: TrainingBatch) -> tuple[float, Tensor]:
    """The loss as training computes it, and its gradient for the tied embeddings."""
    models.student.zero_grad()
    row = batch.row
    hidden = models.student(
        input_ids=row.token_ids[None],
        position_ids=row.position_ids[None],
        attention_mask=row.attention,
    )[:, 0]
    head = head_weight(models.student)
    inputs = LossInputs(
        hidden[batch.supervised],
        head,
        batch.labels,
        batch.weights,
        targets=batch.targets,
        teacher_head=models.teacher.head,
    )
    loss, _ = objective.loss(inputs)
    loss.backward()
    assert head.grad is not None
    return float(loss.detach()), head.grad.clone()


@settings(max_examples=15)
@given(st.data())
def test_both_losses_and_their_gradient(models: Models, data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(list(CASES)))
    name: ObjectiveName = case.split()[0]
    block_size, weight = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([0.0, 0.3, 2.0]))
    config = Config.from_dict(
        {
            "device": "cpu",
            "objective": name,
            "context_attention": "causal",
            "causal_loss_weight": weight,
            "block_size": block_size,
            "supervise_eos": data.draw(st.booleans()),
            **CASES[case],
        }
    )
    assert config.diffusion_kind is not None
    objective = OBJECTIVES[name](config, MASK, VOCABULARY, config.diffusion_kind)
    responses = trajectories if name.startswith("opdlm") else given_responses
    batch = [data.draw(responses(block_size)) for _ in range(data.draw(st.integers(1, 2)))]
    if name != "sft":
        annotate(models, batch, stored="stored" in case)
    documents, count = [], 0
    models.hf_student.zero_grad()
    expected = torch.zeros((), dtype=torch.float64)
    for trajectory in batch:
        document = objective.document(trajectory, torch.Generator().manual_seed(3))
        documents.append(document)
        shown = as_decoding_shows(trajectory, block_size)
        supervised = supervised_tokens(shown, config.objective.supervise_eos)
        if not supervised.any():
            continue
        block = torch.arange(len(supervised)) // block_size
        maskable = torch.arange(len(supervised)) >= len(trajectory.prompt_ids)
        _, t = random_state(maskable, supervised, block, torch.Generator().manual_seed(3))

        def weighted(p: Tensor, q: Tensor, label: int, i: int, t: Tensor = t) -> Tensor:
            return -q[label] / t[i]

        noisy_loss = weighted if name == "sft" else top_k_kl if "off_policy" in case else forward_kl
        total, masks = torch.zeros((), dtype=torch.float64), 0
        for stream in range(1, int(document.stream.max()) + 1):
            masked = masked_tokens(shown, document, stream)
            part, number = dense_loss(
                models, shown, block_size, masked, supervised, noisy_loss, causal_context=True
            )
            total, masks = total + part, masks + number
        causal = cross_entropy if name == "sft" else noisy_loss
        second, predictions = dense_causal_loss(models, shown, supervised, causal)
        own = int(supervised.sum()) if name == "sft" else masks
        total = total + weight * own * second / predictions
        is_row_mean = config.objective.loss_normalization == "row_mean"
        expected = expected + (total / own if is_row_mean else total)
        count += 1 if is_row_mean else own
    packed = objective.rows(documents, 4)
    together = pack(
        documents, pad_multiple=4, row_mean=config.objective.loss_normalization == "row_mean"
    )
    assert sum(row.loss_count for row in packed) == together.loss_count == count
    if not len(together.row.token_ids) or not count:
        return
    loss, grad = gradient(models, objective, together)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-5)
    expected.backward()
    reference = models.hf_student.get_input_embeddings().weight.grad
    assert reference is not None
    difference = (grad.double() - reference).abs().max()
    assert float(difference) <= 2e-4 * float(reference.abs().max()) + 1e-6


def test_a_response_without_supervised_tokens_is_none_of_the_mean(models: Models) -> None:
    """Its only token is an end, which is not supervised: the mean is over the other responses."""
    options = {"objective": "opdlm_off", "loss_normalization": "row_mean", "supervise_eos": False}
    config = Config.from_dict({"device": "cpu", "block_size": 1, **options})
    assert config.diffusion_kind is not None
    objective = OBJECTIVES["opdlm_off"](config, MASK, VOCABULARY, config.diffusion_kind)
    prompt, step = torch.tensor([3]), torch.ones(1, dtype=torch.int64)
    ended = Trajectory(0, prompt, torch.tensor([510]), step, finish_reason="eos")
    other = Trajectory(1, prompt, torch.tensor([5]), step, finish_reason="length")
    annotate(models, [ended, other], stored=False)
    documents = [objective.document(t, torch.Generator()) for t in (ended, other)]
    assert pack(documents[:1], row_mean=True).loss_count == 0
    together, alone = (pack(d, row_mean=True) for d in (documents, documents[1:]))
    assert together.loss_count == alone.loss_count == 1
