import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_dlm.distillation import vocab_parallel_head
from megatron_dlm.distillation.vocab_parallel_divergence import (
    vocab_parallel_divergence,
    vocab_parallel_top_k_divergence,
)
from megatron_dlm.distillation.vocab_parallel_top_k import vocab_parallel_top_k
from megatron_dlm.errors import UserError
from megatron_dlm.types.divergence_spec import DIVERGENCES, DivergenceSpec
from megatron_dlm.types.teacher_targets import TopKTargets
from tests.unit_tests.distillation.dense_reference import (
    LossInputs,
    dense_divergence,
    dense_top_k_targets,
    random_inputs,
    underflowing_inputs,
)


def fused(inputs: LossInputs, spec: DivergenceSpec) -> tuple[torch.Tensor, ...]:
    """(loss sum, per token, gradient of student hidden, gradient of student head)."""
    loss_sum, per_token = vocab_parallel_divergence(
        inputs.student_hidden,
        inputs.student_head,
        inputs.teacher_hidden,
        inputs.teacher_head,
        inputs.token_weights,
        spec,
        inputs.vocab_size,
    )
    gradients = torch.autograd.grad(loss_sum, (inputs.student_hidden, inputs.student_head))
    return loss_sum.detach(), per_token, *gradients


def from_targets(
    inputs: LossInputs, targets: TopKTargets, spec: DivergenceSpec
) -> tuple[torch.Tensor, ...]:
    """The same of a teacher whose k most likely tokens are all that is left."""
    loss_sum, per_token = vocab_parallel_top_k_divergence(
        inputs.student_hidden,
        inputs.student_head,
        targets,
        inputs.token_weights,
        spec,
        inputs.vocab_size,
    )
    gradients = torch.autograd.grad(loss_sum, (inputs.student_hidden, inputs.student_head))
    return loss_sum.detach(), per_token, *gradients


def dense(inputs: LossInputs, spec: DivergenceSpec) -> tuple[torch.Tensor, ...]:
    return dense_divergence(
        inputs, spec.weights, jsd_beta=spec.jsd_beta, top_k=spec.top_k, tail=spec.tail
    )


def assert_equal_to_dense(inputs: LossInputs, spec: DivergenceSpec, rtol: float) -> None:
    for actual, expected in zip(fused(inputs, spec), dense(inputs, spec), strict=True):
        scale = max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
        torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=rtol * scale)


specs = st.builds(
    DivergenceSpec,
    weights=st.dictionaries(st.sampled_from(DIVERGENCES), st.floats(0.1, 3), min_size=1),
    jsd_beta=st.floats(0.05, 0.95),
    top_k=st.integers(0, 12),
    tail=st.sampled_from(["bucket", "ignore"]),
    chunk_size=st.integers(1, 8),
)


@st.composite
def loss_inputs(draw: st.DrawFn, **fixed: object) -> LossInputs:
    vocab_size = draw(st.integers(1, 24))
    return random_inputs(
        n=draw(st.integers(0, 9)),
        hidden_size=draw(st.integers(1, 6)),
        teacher_hidden_size=draw(st.integers(1, 6)),
        vocab_size=vocab_size,
        padded_vocab_size=vocab_size + draw(st.integers(0, 5)),
        teacher_padded_vocab_size=vocab_size + draw(st.integers(0, 5)),
        seed=draw(st.integers(0, 1000)),
        **fixed,
    )


@settings(deadline=None, max_examples=150)
@given(inputs=loss_inputs(), spec=specs)
def test_values_and_gradients_equal_dense(inputs: LossInputs, spec: DivergenceSpec) -> None:
    assert_equal_to_dense(inputs, spec, rtol=1e-10)


@settings(deadline=None, max_examples=60)
@given(inputs=loss_inputs(dtype=torch.float32, logit_scale=3.0), spec=specs)
def test_float32_is_accurate_to_float32(inputs: LossInputs, spec: DivergenceSpec) -> None:
    assert_equal_to_dense(inputs, spec, rtol=2e-5)


@pytest.mark.parametrize("top_k", [0, 4])
@pytest.mark.parametrize("tail", ["bucket", "ignore"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_probabilities_that_underflow(name: str, tail: str, top_k: int) -> None:
    inputs = underflowing_inputs()
    spec = DivergenceSpec({name: 1.0}, top_k=top_k, tail=tail)
    assert all(tensor.isfinite().all() for tensor in fused(inputs, spec))
    assert_equal_to_dense(inputs, spec, rtol=1e-4)


@settings(deadline=None, max_examples=60)
@given(inputs=loss_inputs(), spec=specs)
def test_stored_targets_equal_dense(inputs: LossInputs, spec: DivergenceSpec) -> None:
    assume(0 < spec.top_k < inputs.vocab_size)
    actual = from_targets(inputs, dense_top_k_targets(inputs, spec.top_k), spec)
    for tensor, expected in zip(actual, dense(inputs, spec), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tail", ["bucket", "ignore"])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("logit_scale", [1.0, 100.0])
def test_stored_targets_give_the_loss_of_the_live_teacher(
    name: str, tail: str, logit_scale: float
) -> None:
    inputs = random_inputs(
        n=24,
        vocab_size=40,
        padded_vocab_size=48,
        teacher_padded_vocab_size=40,
        logit_scale=logit_scale,
        dtype=torch.float32,
    )
    spec = DivergenceSpec({name: 1.0}, top_k=5, tail=tail, chunk_size=8)
    targets, _ = vocab_parallel_top_k(
        inputs.teacher_hidden, inputs.teacher_head, 5, inputs.vocab_size, chunk_size=8
    )
    if logit_scale > 1:
        assert (targets.log_probs.exp().sum(1) == 1).any(), "the rest is no longer one minus these"
    for stored, live in zip(from_targets(inputs, targets, spec), fused(inputs, spec), strict=True):
        assert torch.equal(stored, live)


def test_stored_targets_that_do_not_fit_are_named() -> None:
    inputs = random_inputs(n=5, vocab_size=9, padded_vocab_size=12, teacher_padded_vocab_size=9)
    spec = DivergenceSpec({"jsd": 1.0}, top_k=3)
    targets = dense_top_k_targets(inputs, 3)
    with pytest.raises(ValueError, match=r"shape \(4, 3\) for 5 student rows and top_k 3"):
        from_targets(inputs, targets[:4], spec)
    with pytest.raises(ValueError, match=r"shape \(5, 3\) for 5 student rows and top_k 2"):
        from_targets(inputs, targets, dataclasses.replace(spec, top_k=2))
    with pytest.raises(ValueError, match="log-probability of all other tokens"):
        from_targets(inputs, dataclasses.replace(targets, log_rest=None), spec)
    for k in (0, 9):
        with pytest.raises(ValueError, match=f"k = {k} is no proper part of a vocabulary of 9"):
            vocab_parallel_top_k(inputs.teacher_hidden, inputs.teacher_head, k, 9)


def test_student_that_equals_its_teacher_is_at_the_minimum() -> None:
    inputs = random_inputs(n=6, vocab_size=20, padded_vocab_size=20, teacher_padded_vocab_size=20)
    inputs.teacher_hidden = inputs.student_hidden.detach().clone()
    inputs.teacher_head = inputs.student_head.detach().clone()
    for top_k in (0, 5):
        for name in DIVERGENCES:
            for tensor in fused(inputs, DivergenceSpec({name: 1.0}, top_k=top_k)):
                torch.testing.assert_close(tensor, torch.zeros_like(tensor), rtol=0, atol=1e-12)


def test_bucket_keeps_it_a_divergence_and_ignore_does_not() -> None:
    inputs = random_inputs(
        n=64, vocab_size=40, padded_vocab_size=40, teacher_padded_vocab_size=40, logit_scale=3.0
    )
    # A student that is the teacher made sharper puts more mass on the teacher's best tokens.
    inputs.teacher_hidden = 0.5 * inputs.student_hidden.detach()
    inputs.teacher_head = inputs.student_head.detach()
    full = fused(inputs, DivergenceSpec({"forward_kl": 1.0}))[1]
    bucket = fused(inputs, DivergenceSpec({"forward_kl": 1.0}, top_k=3))[1]
    ignore = fused(inputs, DivergenceSpec({"forward_kl": 1.0}, top_k=3, tail="ignore"))[1]
    assert (bucket >= 0).all()
    assert (bucket <= full).all(), "merging tokens cannot raise a KL (data processing)"
    assert (ignore < 0).any()


def test_forward_kl_of_two_tokens_by_hand() -> None:
    one = torch.ones(1, 1)
    loss_sum, per_token = vocab_parallel_divergence(
        one,
        torch.tensor([[0.0], [math.log(3.0)]]),  # q = 1/4, 3/4
        one,
        torch.tensor([[0.0], [0.0]]),  # p = 1/2, 1/2
        torch.tensor([2.0]),
        DivergenceSpec.parse("forward_kl"),
        vocab_size=2,
    )
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert per_token.item() == pytest.approx(expected, abs=1e-6)
    assert loss_sum.item() == pytest.approx(2 * expected, abs=1e-6)


@pytest.mark.parametrize("top_k", [0, 4])
def test_gradients_equal_finite_differences(top_k: int) -> None:
    inputs = random_inputs(n=3, vocab_size=9, padded_vocab_size=10, teacher_padded_vocab_size=9)
    spec = DivergenceSpec({"forward_kl": 1.0, "reverse_kl": 0.5, "jsd": 2.0}, 0.3, top_k)
    _, _, *gradients = fused(inputs, spec)
    step = 1e-6
    for leaf, gradient in zip((inputs.student_hidden, inputs.student_head), gradients, strict=True):
        for index in range(leaf.numel()):
            losses = []
            for sign in (1, -1):
                leaf.data.view(-1)[index] += sign * step
                losses.append(fused(inputs, spec)[0].item())
                leaf.data.view(-1)[index] -= sign * step
            slope = (losses[0] - losses[1]) / (2 * step)
            assert gradient.view(-1)[index].item() == pytest.approx(slope, abs=1e-7)


def test_bfloat16_stays_near_float64() -> None:
    inputs = random_inputs(
        n=40,
        hidden_size=64,
        teacher_hidden_size=32,
        vocab_size=300,
        padded_vocab_size=320,
        teacher_padded_vocab_size=304,
        dtype=torch.bfloat16,
    )
    spec = DivergenceSpec({"forward_kl": 1.0}, chunk_size=7)
    loss_sum, per_token, grad_hidden, grad_head = fused(inputs, spec)
    expected_sum, expected, expected_grad_hidden, expected_grad_head = dense(inputs, spec)
    assert loss_sum.dtype == per_token.dtype == torch.float32
    assert grad_hidden.dtype == grad_head.dtype == torch.bfloat16
    torch.testing.assert_close(per_token.double(), expected, rtol=2e-2, atol=2e-2)
    assert loss_sum.item() == pytest.approx(expected_sum.item(), rel=5e-3)
    for actual, reference in (
        (grad_hidden, expected_grad_hidden),
        (grad_head, expected_grad_head),
    ):
        error = (actual.double() - reference).norm() / reference.norm()
        assert error < 1e-2, error


def test_tiles_of_a_chunk_do_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(n=9, vocab_size=20, padded_vocab_size=20, teacher_padded_vocab_size=20)
    for top_k in (0, 3):
        spec = DivergenceSpec({"forward_kl": 1.0, "jsd": 0.5}, top_k=top_k)
        whole = fused(inputs, spec)
        with monkeypatch.context() as patch:
            patch.setattr(vocab_parallel_head, "TILE_ELEMENTS", 40)
            tiled = fused(inputs, spec)
        for actual, expected in zip(tiled, whole, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_bfloat16_gradients_are_added_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(
        n=9,
        vocab_size=20,
        padded_vocab_size=24,
        teacher_padded_vocab_size=20,
        dtype=torch.bfloat16,
    )
    spec = DivergenceSpec({"forward_kl": 1.0}, chunk_size=4)
    whole = fused(inputs, spec)
    monkeypatch.setattr(vocab_parallel_head, "PRODUCT_ELEMENTS", 30)
    for actual, expected in zip(fused(inputs, spec), whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "dtype", "free", "tokens"),
    [
        (151_936, torch.float32, None, 512),
        (151_936, torch.bfloat16, None, 320),
        (18_992, torch.bfloat16, None, 2_944),
        (151_936, torch.bfloat16, 60 << 30, 320),
        (151_936, torch.bfloat16, 1 << 30, 128),
        (151_936, torch.bfloat16, 1 << 20, 16),
    ],
)
def test_a_chunk_is_what_memory_holds(
    rows: int,
    dtype: torch.dtype,
    free: int | None,
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vocab_parallel_head.platform, "free_memory", lambda: free)
    head = torch.empty(rows, 1, dtype=dtype)
    chosen = vocab_parallel_head.tokens_of_chunk(head, None)
    assert chosen == tokens
    assert tokens == 16 or chosen * rows * 8 <= min(640 << 20, (free or 1 << 40) / 4)


def test_no_tokens_give_zero_and_stay_connected() -> None:
    inputs = random_inputs(n=0, vocab_size=9, padded_vocab_size=12, teacher_padded_vocab_size=9)
    loss_sum, per_token, grad_hidden, grad_head = fused(inputs, DivergenceSpec.parse("jsd"))
    assert loss_sum.item() == 0
    assert per_token.shape == (0,)
    assert grad_hidden.shape == (0, 5)
    assert torch.equal(grad_head, torch.zeros_like(inputs.student_head))


def test_gradients_reach_only_who_asked_and_scale_with_the_loss() -> None:
    inputs = random_inputs(n=5, vocab_size=9, padded_vocab_size=12, teacher_padded_vocab_size=9)
    spec = DivergenceSpec.parse("forward_kl", chunk_size=2)
    _, _, grad_hidden, grad_head = fused(inputs, spec)
    arguments = (inputs.teacher_hidden, inputs.teacher_head, inputs.token_weights, spec, 9)

    frozen_head = inputs.student_head.detach()
    loss_sum, per_token = vocab_parallel_divergence(inputs.student_hidden, frozen_head, *arguments)
    assert not per_token.requires_grad
    (-3 * loss_sum).backward()
    torch.testing.assert_close(inputs.student_hidden.grad, -3 * grad_hidden)
    with pytest.raises(RuntimeError, match="first backward"):
        loss_sum.backward()

    frozen_hidden = inputs.student_hidden.detach()
    vocab_parallel_divergence(frozen_hidden, inputs.student_head, *arguments)[0].backward()
    torch.testing.assert_close(inputs.student_head.grad, grad_head)

    with torch.no_grad():
        value, per_token = vocab_parallel_divergence(
            inputs.student_hidden, inputs.student_head, *arguments
        )
    assert not value.requires_grad
    assert value == loss_sum.detach()


def test_shapes_that_disagree_are_named() -> None:
    inputs = random_inputs(n=5, vocab_size=9, padded_vocab_size=12, teacher_padded_vocab_size=9)
    spec = DivergenceSpec.parse("forward_kl")
    inputs.teacher_hidden = inputs.teacher_hidden[:4]
    with pytest.raises(ValueError, match="4 teacher rows for 5 student rows"):
        fused(inputs, spec)
    inputs = random_inputs(n=5, vocab_size=9, padded_vocab_size=12, teacher_padded_vocab_size=9)
    inputs.vocab_size = 10
    with pytest.raises(ValueError, match="9 rows cannot hold 10 vocabulary rows"):
        fused(inputs, spec)
    inputs.vocab_size = 9
    inputs.token_weights = inputs.token_weights[:1]
    with pytest.raises(ValueError, match=r"token_weights has shape \(1,\), expected \(5,\)"):
        fused(inputs, spec)


def test_parse() -> None:
    assert DivergenceSpec.parse("jsd").weights == {"jsd": 1.0}
    spec = DivergenceSpec.parse(
        " forward_kl:0.25, reverse_kl ", jsd_beta=0.1, top_k=16, tail="ignore", chunk_size=64
    )
    assert spec == DivergenceSpec({"forward_kl": 0.25, "reverse_kl": 1.0}, 0.1, 16, "ignore", 64)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("kl", "'kl'.*choose from forward_kl"),
        ("", "names no divergence"),
        ("jsd:half", "'half' is not a number"),
        ("jsd:0", "positive weight"),
        ("jsd:nan", "positive weight"),
        ("jsd,jsd:2", "names jsd twice"),
    ],
)
def test_parse_rejects(text: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        DivergenceSpec.parse(text)
