"""References of the fused losses: float64, the whole vocabulary at once, plain autograd."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dlm.types.teacher_targets import TopKTargets


@dataclass
class LossInputs:
    """Leaves of one loss: student and teacher hidden states and (whole) heads, weights, labels."""

    student_hidden: Tensor  # [n, h]
    student_head: Tensor  # [padded_vocabulary, h]
    teacher_hidden: Tensor  # [n, h_t]
    teacher_head: Tensor  # [padded_vocabulary_t, h_t]
    token_weights: Tensor  # [n]
    labels: Tensor  # [n]
    vocab_size: int


def random_inputs(
    *,
    n: int,
    hidden_size: int = 5,
    teacher_hidden_size: int = 3,
    vocab_size: int,
    padded_vocab_size: int,
    teacher_padded_vocab_size: int,
    logit_scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * scale).to(dtype)

    def head(rows: int, columns: int) -> Tensor:
        weights = normal(rows, columns, columns**-0.5)
        weights[vocab_size:] = 50.0  # padding that is read by mistake dominates every softmax
        return weights

    return LossInputs(
        student_hidden=normal(n, hidden_size, logit_scale).requires_grad_(),
        student_head=head(padded_vocab_size, hidden_size).requires_grad_(),
        teacher_hidden=normal(n, teacher_hidden_size, logit_scale),
        teacher_head=head(teacher_padded_vocab_size, teacher_hidden_size),
        token_weights=torch.rand(n, generator=generator) * 2,
        labels=torch.randint(vocab_size, (n,), generator=generator),
        vocab_size=vocab_size,
    )


def underflowing_inputs() -> LossInputs:
    """float32 logits of a few hundred, many of them with probability zero in float32.

    The entries are coarse enough for their products to be exact in float32. Otherwise the rounding
    of logits of that size, not the loss under test, would decide the last digits compared.
    """
    inputs = random_inputs(
        n=16,
        vocab_size=32,
        padded_vocab_size=40,
        teacher_padded_vocab_size=32,
        logit_scale=100.0,
        dtype=torch.float32,
    )
    with torch.no_grad():
        for hidden in (inputs.student_hidden, inputs.teacher_hidden):
            hidden.round_()
        for head in (inputs.student_head, inputs.teacher_head):
            head.mul_(16).round_().div_(16)
        logits = inputs.student_hidden @ inputs.student_head.T
    assert (logits[:, : inputs.vocab_size].softmax(-1) == 0).any()
    return inputs


def dense_divergence(
    inputs: LossInputs,
    weights: Mapping[str, float],
    *,
    jsd_beta: float = 0.5,
    top_k: int = 0,
    tail: str = "bucket",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss sum, per token, gradient of student hidden, gradient of student head) in float64."""
    hidden, head = _float64_leaves(inputs)
    student = (hidden @ head.T)[:, : inputs.vocab_size]
    teacher = inputs.teacher_hidden.double() @ inputs.teacher_head.double().T
    log_p = teacher[:, : inputs.vocab_size].log_softmax(-1)
    log_q = student.log_softmax(-1)
    if 0 < top_k < inputs.vocab_size:
        order = log_p.argsort(-1, descending=True)
        log_p, log_q = log_p.gather(1, order), log_q.gather(1, order)
        rest_p, rest_q = (x[:, top_k:].logsumexp(-1, keepdim=True) for x in (log_p, log_q))
        log_p, log_q = log_p[:, :top_k], log_q[:, :top_k]
        if tail == "bucket":
            log_p, log_q = torch.cat([log_p, rest_p], 1), torch.cat([log_q, rest_q], 1)
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.stack([log_p + math.log(jsd_beta), log_q + math.log(1 - jsd_beta)]).logsumexp(0)
    divergences = {
        "forward_kl": (p * (log_p - log_q)).sum(-1),
        "reverse_kl": (q * (log_q - log_p)).sum(-1),
        "jsd": jsd_beta * (p * (log_p - log_m)).sum(-1)
        + (1 - jsd_beta) * (q * (log_q - log_m)).sum(-1),
    }
    per_token = torch.zeros(hidden.shape[0], dtype=torch.float64) + 0 * student.sum(-1)
    for name, weight in weights.items():
        per_token = per_token + weight * divergences[name]
    return _with_gradients(per_token, inputs, hidden, head)


def dense_top_k_targets(inputs: LossInputs, k: int) -> TopKTargets:
    """The teacher's k most likely tokens, log-probabilities in float64 although stored in less."""
    teacher = inputs.teacher_hidden.double() @ inputs.teacher_head.double().T
    log_p = teacher[:, : inputs.vocab_size].log_softmax(-1)
    order = log_p.argsort(-1, descending=True)
    log_p = log_p.gather(1, order)
    return TopKTargets(order[:, :k].int(), log_p[:, :k], log_p[:, k:].logsumexp(-1))


def dense_cross_entropy(inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss sum, per token, gradient of hidden, gradient of head) in float64."""
    hidden, head = _float64_leaves(inputs)
    logits = (hidden @ head.T)[:, : inputs.vocab_size]
    per_token = torch.nn.functional.cross_entropy(logits, inputs.labels, reduction="none")
    return _with_gradients(per_token, inputs, hidden, head)


def _float64_leaves(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    return (
        inputs.student_hidden.detach().double().requires_grad_(),
        inputs.student_head.detach().double().requires_grad_(),
    )


def _with_gradients(
    per_token: Tensor, inputs: LossInputs, hidden: Tensor, head: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss_sum = (per_token * inputs.token_weights.double()).sum()
    grad_hidden, grad_head = torch.autograd.grad(loss_sum, (hidden, head))
    return loss_sum.detach(), per_token.detach(), grad_hidden, grad_head


def teacher_targets(inputs: LossInputs, k: int) -> TopKTargets:
    """The teacher's k most likely tokens, read off its whole distribution."""
    head = inputs.teacher_head[: inputs.vocab_size].detach()
    log_p = (inputs.teacher_hidden @ head.T).double().log_softmax(-1)
    log_probs, ids = log_p.sort(dim=1, descending=True)
    return TopKTargets(ids[:, :k].int(), log_probs[:, :k])


def dense_clipped_reverse_kl(inputs: LossInputs, k: int, limit: float) -> tuple[Tensor, ...]:
    """Loss sum, per token, and the gradients of hidden states and head, by autograd."""
    hidden = inputs.student_hidden.detach().double().requires_grad_()
    head = inputs.student_head.detach().double().requires_grad_()
    targets = teacher_targets(inputs, k)
    q = (hidden @ head[: inputs.vocab_size].T).gather(1, targets.token_ids.long()).softmax(-1)
    p = targets.log_probs.exp() / targets.log_probs.exp().sum(1, keepdim=True)
    terms = torch.stack([q[:, v] * (q[:, v] / p[:, v]).log() for v in range(k)], dim=1)
    per_token = torch.where(terms > limit, torch.full_like(terms, limit), terms).sum(1)
    loss_sum = (per_token * inputs.token_weights.double()).sum()
    gradients = torch.autograd.grad(loss_sum, (hidden, head))
    return (loss_sum.detach(), per_token.detach(), *gradients)
