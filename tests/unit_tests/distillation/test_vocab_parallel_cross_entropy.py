import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.distillation.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy
from tests.unit_tests.distillation.dense_reference import (
    LossInputs,
    dense_cross_entropy,
    random_inputs,
    underflowing_inputs,
)


def assert_equal_to_dense(inputs: LossInputs, chunk_size: int, rtol: float) -> None:
    loss_sum, per_token = vocab_parallel_cross_entropy(
        inputs.student_hidden,
        inputs.student_head,
        inputs.labels,
        inputs.token_weights,
        inputs.vocab_size,
        chunk_size=chunk_size,
    )
    gradients = torch.autograd.grad(loss_sum, (inputs.student_hidden, inputs.student_head))
    actual = (loss_sum.detach(), per_token, *gradients)
    for value, expected in zip(actual, dense_cross_entropy(inputs), strict=True):
        scale = max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
        torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=rtol * scale)


@settings(deadline=None, max_examples=80)
@given(
    n=st.integers(0, 9),
    hidden_size=st.integers(1, 6),
    vocab_size=st.integers(1, 24),
    padding=st.integers(0, 5),
    chunk_size=st.integers(1, 10),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_equal_dense(
    n: int, hidden_size: int, vocab_size: int, padding: int, chunk_size: int, seed: int
) -> None:
    inputs = random_inputs(
        n=n,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        padded_vocab_size=vocab_size + padding,
        teacher_padded_vocab_size=vocab_size,
        seed=seed,
    )
    assert_equal_to_dense(inputs, chunk_size, rtol=1e-10)


def test_probabilities_that_underflow() -> None:
    inputs = underflowing_inputs()
    assert_equal_to_dense(inputs, chunk_size=5, rtol=1e-4)


@pytest.mark.parametrize("label", [-100, 9])
def test_label_outside_the_vocabulary_is_refused(label: int) -> None:
    inputs = random_inputs(n=3, vocab_size=9, padded_vocab_size=12, teacher_padded_vocab_size=9)
    inputs.labels[1] = label
    with pytest.raises(ValueError, match=f"labels span .*{label}"):
        assert_equal_to_dense(inputs, chunk_size=2, rtol=0)
