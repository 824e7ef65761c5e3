"""The clipped divergence over a vocabulary in shards equals the dense float64 reference."""

import pytest
import torch
import torch.distributed as dist

from megatron_dlm.distillation.clipped_reverse_kl import clipped_reverse_kl
from tests.distributed_tests.spawn import run_distributed
from tests.unit_tests.distillation.dense_reference import (
    LossInputs,
    dense_clipped_reverse_kl,
    random_inputs,
    teacher_targets,
)

LIMIT = 0.05
# Predictions, vocabulary, padded vocabulary, tokens compared.
CASES = [(10, 29, 32, 5), (6, 11, 24, 10), (0, 29, 32, 3)]


def _inputs(case: tuple[int, int, int, int]) -> LossInputs:
    n, vocab_size, padded, _ = case
    return random_inputs(
        n=n,
        vocab_size=vocab_size,
        padded_vocab_size=padded,
        teacher_padded_vocab_size=vocab_size,
        logit_scale=2.0,
    )


def _losses_of_rank(rank: int) -> list[tuple[torch.Tensor, ...]]:
    world_size = dist.get_world_size()
    results = []
    for case in CASES:
        inputs = _inputs(case)
        hidden = inputs.student_hidden.detach().requires_grad_()
        head = inputs.student_head.detach().chunk(world_size)[rank].clone().requires_grad_()
        loss_sum, per_token = clipped_reverse_kl(
            hidden,
            head,
            teacher_targets(inputs, case[3]),
            inputs.token_weights,
            LIMIT,
            inputs.vocab_size,
            dist.group.WORLD,
            chunk_size=4,
        )
        loss_sum.backward()
        assert hidden.grad is not None
        assert head.grad is not None
        dist.all_reduce(hidden.grad)  # as the backward of Megatron's wrappers around hidden does
        results.append((loss_sum.detach(), per_token, hidden.grad, head.grad))
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_shards_equal_dense(world_size: int) -> None:
    of_ranks = run_distributed(_losses_of_rank, world_size)
    for index, case in enumerate(CASES):
        *replicated, grad_head = dense_clipped_reverse_kl(_inputs(case), case[3], LIMIT)
        for of_rank in of_ranks:
            actual = list(of_rank[index][:3])
            torch.testing.assert_close(actual, replicated, rtol=1e-9, atol=1e-9)
        heads = torch.cat([of_rank[index][3] for of_rank in of_ranks])
        torch.testing.assert_close(heads, grad_head, rtol=1e-9, atol=1e-9)
