"""Losses over a vocabulary in two or four shards equal the dense float64 reference on one rank."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dlm.distillation.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy
from megatron_dlm.distillation.vocab_parallel_divergence import (
    vocab_parallel_divergence,
    vocab_parallel_top_k_divergence,
)
from megatron_dlm.distillation.vocab_parallel_top_k import vocab_parallel_top_k
from megatron_dlm.types.divergence_spec import DivergenceSpec
from tests.distributed_tests.spawn import run_distributed
from tests.unit_tests.distillation.dense_reference import (
    LossInputs,
    dense_cross_entropy,
    dense_divergence,
    dense_top_k_targets,
    random_inputs,
)

# Loss sum, per token, gradient of hidden, gradient of the head's shard.
Losses = tuple[torch.Tensor, ...]

EVERYTHING = {"forward_kl": 1.0, "reverse_kl": 0.5, "jsd": 0.25}
SPECS = [
    DivergenceSpec(EVERYTHING, jsd_beta=0.3, top_k=top_k, tail=tail, chunk_size=4)
    for top_k, tail in [(0, "bucket"), (3, "bucket"), (3, "ignore"), (9, "bucket")]
]
STORED = [spec for spec in SPECS if spec.top_k]
"""Those that are computed from stored targets as well."""

# Per case: tokens, vocabulary, padded vocabulary (of 2 and of 4 shards).
CASES = {
    "padding_on_the_last_rank": (10, 29, 32),
    "last_rank_all_padding": (6, 11, 24),
    "no_tokens": (0, 29, 32),
}


def case_inputs(name: str, dtype: torch.dtype = torch.float64) -> LossInputs:
    n, vocab_size, padded = CASES[name]
    return random_inputs(
        n=n,
        vocab_size=vocab_size,
        padded_vocab_size=padded,
        teacher_padded_vocab_size=padded,
        dtype=dtype,
    )


def losses_of_rank(rank: int, name: str, dtype: torch.dtype) -> list[Losses]:
    """The losses of every spec, those of stored targets, then the cross entropy, each with the head
    sharded over the world."""
    group, world_size = dist.group.WORLD, dist.get_world_size()
    inputs = case_inputs(name, dtype)
    teacher_head = inputs.teacher_head.chunk(world_size)[rank]
    results = []
    for kind, spec in [("live", s) for s in SPECS] + [("stored", s) for s in STORED] + [("", None)]:
        hidden = inputs.student_hidden.detach().requires_grad_()
        head = inputs.student_head.detach().chunk(world_size)[rank].clone().requires_grad_()
        weights, vocab_size = inputs.token_weights, inputs.vocab_size
        if spec is None:
            loss_sum, per_token = vocab_parallel_cross_entropy(
                hidden, head, inputs.labels, weights, vocab_size, group, chunk_size=4
            )
        elif kind == "live":
            loss_sum, per_token = vocab_parallel_divergence(
                hidden, head, inputs.teacher_hidden, teacher_head, weights, spec, vocab_size, group
            )
        else:
            targets = dense_top_k_targets(inputs, spec.top_k)
            loss_sum, per_token = vocab_parallel_top_k_divergence(
                hidden, head, targets, weights, spec, vocab_size, group
            )
        loss_sum.backward()
        dist.all_reduce(hidden.grad)  # as the backward of Megatron's wrappers around hidden does
        results.append((loss_sum.detach(), per_token, hidden.grad, head.grad))
    return results


def top_k_of_rank(rank: int, name: str, k: int) -> tuple[torch.Tensor | None, ...]:
    """Ids, log-probabilities and log-probability of the rest, with the head sharded."""
    inputs = case_inputs(name)
    head = inputs.teacher_head.chunk(dist.get_world_size())[rank]
    targets, _ = vocab_parallel_top_k(
        inputs.teacher_hidden, head, k, inputs.vocab_size, dist.group.WORLD, chunk_size=4
    )
    return targets.token_ids, targets.log_probs, targets.log_rest


def mismatched_heads(rank: int) -> str:
    """What is said of a teacher whose shards begin at other ids."""
    inputs = case_inputs("padding_on_the_last_rank")
    world_size = dist.get_world_size()
    with pytest.raises(ValueError, match="at different ids") as error:
        vocab_parallel_divergence(
            inputs.student_hidden,
            inputs.student_head.chunk(world_size)[rank],
            inputs.teacher_hidden,
            torch.cat([inputs.teacher_head, inputs.teacher_head]).chunk(world_size)[rank],
            inputs.token_weights,
            SPECS[0],
            inputs.vocab_size,
            dist.group.WORLD,
        )
    return str(error.value)


def run_rank(rank: int) -> dict[str, Any]:
    """All that is compared below, in one world: starting processes costs more than the losses."""
    return {
        "float64": {name: losses_of_rank(rank, name, torch.float64) for name in CASES},
        "bfloat16": {name: losses_of_rank(rank, name, torch.bfloat16) for name in CASES},
        "top_k": {name: top_k_of_rank(rank, name, 9) for name in CASES},
        "mismatch": mismatched_heads(rank),
    }


@pytest.fixture(scope="module", params=[2, 4])
def of_ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_distributed(run_rank, request.param)


@pytest.mark.parametrize("name", CASES)
def test_shards_equal_dense(of_ranks: list[dict[str, Any]], name: str) -> None:
    inputs = case_inputs(name)
    expected = [
        dense_divergence(
            inputs, spec.weights, jsd_beta=spec.jsd_beta, top_k=spec.top_k, tail=spec.tail
        )
        for spec in SPECS + STORED
    ] + [dense_cross_entropy(inputs)]
    for index, (*replicated, grad_head) in enumerate(expected):
        shards = [of_rank["float64"][name][index] for of_rank in of_ranks]
        for *actual, _ in shards:
            torch.testing.assert_close(actual, replicated, rtol=1e-10, atol=1e-10)
        actual_head = torch.cat([shard[-1] for shard in shards])
        torch.testing.assert_close(actual_head, grad_head, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_bit_for_bit_in_bfloat16(of_ranks: list[dict[str, Any]], name: str) -> None:
    first, *others = [of_rank["bfloat16"][name] for of_rank in of_ranks]
    for other in others:
        for (*a, _), (*b, _) in zip(first, other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_top_k_of_shards_is_that_of_the_whole(of_ranks: list[dict[str, Any]], name: str) -> None:
    expected = dense_top_k_targets(case_inputs(name), 9)
    for of_rank in of_ranks:
        token_ids, log_probs, log_rest = of_rank["top_k"][name]
        assert torch.equal(token_ids, expected.token_ids)
        torch.testing.assert_close(log_probs, expected.log_probs.float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(log_rest, expected.log_rest.float(), rtol=1e-6, atol=1e-6)


def test_a_teacher_whose_shards_begin_elsewhere_is_refused(of_ranks: list[dict[str, Any]]) -> None:
    for of_rank in of_ranks:
        assert "split the vocabulary of 29 at different ids" in of_rank["mismatch"]


def fail_on_rank_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank one's own words")
    dist.barrier()


def test_failure_of_a_rank_reaches_the_caller() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 failed.*rank one's own words"):
        run_distributed(fail_on_rank_one, 2)
