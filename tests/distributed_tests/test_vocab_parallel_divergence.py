"""Losses over a vocabulary in two or four shards equal the dense float64 reference on one rank."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dlm.distillation.divergence_spec import DivergenceSpec
from megatron_dlm.distillation.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy
from megatron_dlm.distillation.vocab_parallel_divergence import (
    vocab_parallel_divergence,
)
from megatron_dlm.distillation.vocab_parallel_head import reshard_head
from tests.distributed_tests.spawn import run_distributed
from tests.unit_tests.distillation.dense_reference import (
    LossInputs,
    dense_cross_entropy,
    dense_divergence,
    random_inputs,
)

# Loss sum, per token, gradient of hidden, gradient of the head's shard.
Losses = tuple[torch.Tensor, ...]

EVERYTHING = {"forward_kl": 1.0, "reverse_kl": 0.5, "jsd": 0.25}
SPECS = [
    DivergenceSpec(EVERYTHING, jsd_beta=0.3, top_k=top_k, tail=tail, chunk_size=4)
    for top_k, tail in [(0, "bucket"), (3, "bucket"), (3, "ignore"), (9, "bucket")]
]
# Per case: tokens, vocabulary, padded vocabulary of student and teacher (of 2 and of 4 shards).
CASES = {
    "padding_on_the_last_rank": (10, 29, 32, 32),
    "last_rank_all_padding": (6, 11, 24, 24),
    "teacher_padded_otherwise": (9, 29, 32, 48),
    "student_padded_otherwise": (9, 29, 48, 32),
    "no_tokens": (0, 29, 32, 48),
}


RESHARDINGS = [(6, 8, 11), (8, 6, 11), (12, 3, 6)]  # rows held, rows wanted, vocabulary


def case_inputs(name: str, dtype: torch.dtype = torch.float64) -> LossInputs:
    n, vocab_size, padded, teacher_padded = CASES[name]
    return random_inputs(
        n=n,
        vocab_size=vocab_size,
        padded_vocab_size=padded,
        teacher_padded_vocab_size=teacher_padded,
        dtype=dtype,
    )


def losses_of_rank(rank: int, name: str, dtype: torch.dtype) -> list[Losses]:
    """The losses of every spec, then the cross entropy, with the head sharded over the world."""
    group, world_size = dist.group.WORLD, dist.get_world_size()
    inputs = case_inputs(name, dtype)
    results = []
    for spec in [*SPECS, None]:
        hidden = inputs.student_hidden.detach().requires_grad_()
        head = inputs.student_head.detach().chunk(world_size)[rank].clone().requires_grad_()
        if spec is None:
            loss_sum, per_token = vocab_parallel_cross_entropy(
                hidden,
                head,
                inputs.labels,
                inputs.token_weights,
                inputs.vocab_size,
                group,
                chunk_size=4,
            )
        else:
            loss_sum, per_token = vocab_parallel_divergence(
                hidden,
                head,
                inputs.teacher_hidden,
                inputs.teacher_head.chunk(world_size)[rank],
                inputs.token_weights,
                spec,
                inputs.vocab_size,
                group,
            )
        loss_sum.backward()
        dist.all_reduce(hidden.grad)  # as the backward of Megatron's wrappers around hidden does
        results.append((loss_sum.detach(), per_token, hidden.grad, head.grad))
    return results


def resharded(rank: int, rows_held: int, rows_wanted: int, vocab_size: int) -> torch.Tensor:
    """A bfloat16 head whose row i holds i + 1, moved between shards."""
    world_size = dist.get_world_size()
    rows = torch.arange(1.0, rows_held * world_size + 1).unsqueeze(1).expand(-1, 3)
    head = rows.chunk(world_size)[rank].bfloat16()
    return reshard_head(head, rows_wanted, vocab_size, dist.group.WORLD).float()


def run_rank(rank: int) -> dict[str, Any]:
    """All that is compared below, in one world: starting processes costs more than the losses."""
    return {
        "float64": {name: losses_of_rank(rank, name, torch.float64) for name in CASES},
        "bfloat16": {name: losses_of_rank(rank, name, torch.bfloat16) for name in CASES},
        "resharded": [resharded(rank, *sizes) for sizes in RESHARDINGS],
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
        for spec in SPECS
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


def test_reshard_head(of_ranks: list[dict[str, Any]]) -> None:
    for index, (_, rows_wanted, vocab_size) in enumerate(RESHARDINGS):
        rows = torch.cat([of_rank["resharded"][index] for of_rank in of_ranks])[:, 0]
        expected = torch.zeros(len(of_ranks) * rows_wanted)
        expected[:vocab_size] = torch.arange(1.0, vocab_size + 1)
        assert torch.equal(rows, expected)


def fail_on_rank_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank one's own words")
    dist.barrier()


def test_failure_of_a_rank_reaches_the_caller() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 failed.*rank one's own words"):
        run_distributed(fail_on_rank_one, 2)
