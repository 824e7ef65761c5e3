import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.distillation.clipped_reverse_kl import clipped_reverse_kl
from megatron_dlm.types.teacher_targets import TopKTargets
from tests.unit_tests.distillation.dense_reference import (
    LossInputs,
    dense_clipped_reverse_kl,
    random_inputs,
    teacher_targets,
)


def assert_equal_to_dense(inputs: LossInputs, k: int, limit: float, chunk_size: int) -> None:
    loss_sum, per_token = clipped_reverse_kl(
        inputs.student_hidden,
        inputs.student_head,
        teacher_targets(inputs, k),
        inputs.token_weights,
        limit,
        inputs.vocab_size,
        chunk_size=chunk_size,
    )
    gradients = torch.autograd.grad(loss_sum, (inputs.student_hidden, inputs.student_head))
    actual = (loss_sum.detach(), per_token, *gradients)
    for value, expected in zip(actual, dense_clipped_reverse_kl(inputs, k, limit), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=80)
@given(
    n=st.integers(0, 9),
    vocab_size=st.integers(2, 24),
    padding=st.integers(0, 5),
    k=st.integers(1, 20),
    limit=st.sampled_from([0.01, 0.05, 0.3, 100.0]),
    chunk_size=st.integers(1, 10),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_equal_dense(
    n: int, vocab_size: int, padding: int, k: int, limit: float, chunk_size: int, seed: int
) -> None:
    inputs = random_inputs(
        n=n,
        vocab_size=vocab_size,
        padded_vocab_size=vocab_size + padding,
        teacher_padded_vocab_size=vocab_size,
        logit_scale=2.0,
        seed=seed,
    )
    assert_equal_to_dense(inputs, min(k, vocab_size - 1), limit, chunk_size)


def test_without_limit_it_is_the_divergence_of_renormalised_distributions() -> None:
    """By hand: p = (2/3, 1/3), q = (1/2, 1/2) over the two tokens compared."""
    head = torch.eye(3, dtype=torch.float64)
    hidden = torch.tensor([[1.0, 1.0, 5.0]], dtype=torch.float64).requires_grad_()
    targets = TopKTargets(
        torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([[0.4, 0.2]]).double().log()
    )

    def loss(limit: float) -> torch.Tensor:
        return clipped_reverse_kl(hidden, head, targets, torch.ones(1), limit, 3)[0]

    def value(limit: float) -> float:
        return float(loss(limit).detach())

    kl = 0.5 * torch.tensor(0.75).double().log() + 0.5 * torch.tensor(1.5).double().log()
    assert value(9.0) == pytest.approx(float(kl))
    assert value(0.05) == pytest.approx(float(0.5 * torch.tensor(0.75).log() + 0.05))
    loss(9.0).backward()
    assert hidden.grad is not None
    assert hidden.grad[0, 2] == 0  # what is not compared is not trained
    assert float(hidden.grad[0, 0]) == pytest.approx(-float(hidden.grad[0, 1]))
    assert float(hidden.grad[0, 0]) < 0  # more of what the teacher prefers


def test_targets_of_another_number_are_refused() -> None:
    inputs = random_inputs(n=3, vocab_size=9, padded_vocab_size=9, teacher_padded_vocab_size=9)
    targets = teacher_targets(inputs, 2)[torch.tensor([0, 1])]
    with pytest.raises(ValueError, match="2 targets for 3 hidden states"):
        clipped_reverse_kl(
            inputs.student_hidden, inputs.student_head, targets, inputs.token_weights, 1.0, 9
        )
