"""Figures about an update beside its loss: by position, of the causal mode, and entropy.

They are sums on the device that travel with the loss, so that no rank waits for the device once
more. A micro-batch's figures are a vector: the losses' sums, then their counts, by position; sum
and count of the losses of the autoregressive mode, where the context is causal; sum and count of
entropies. The first and the last are of MASKs, where the context is causal.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dlm.data.packing import TrainingBatch
from megatron_dlm.distillation.vocab_parallel_entropy import vocab_parallel_entropy
from megatron_dlm.models.attention_layout import CLEAN, Field
from megatron_dlm.objectives.base import LossInputs, Objective

POSITIONS = 16
"""Most stretches of a block; one of up to 16 tokens has as many as tokens."""

ENTROPIES = 64
"""Tokens of an update at which each data-parallel rank computes the student's entropy."""

SIZE = 2 * POSITIONS + 4
"""Numbers of a micro-batch's figures."""


def measured(
    objective: Objective,
    batch: TrainingBatch,
    inputs: LossInputs,
    per_token: Tensor,
    *,
    with_entropy: bool,
) -> Tensor:
    """The figures of a micro-batch, [SIZE] float64 on its device.

    Args:
        objective: Of the run.
        batch: On the device.
        inputs: Of its loss, n supervised tokens.
        per_token: [n], the unweighted loss of each.
        with_entropy: Whether to compute entropies of its tokens.
    """
    figures = per_token.new_zeros(SIZE, dtype=torch.float64)
    stretches, kind = _stretches(objective), objective.diffusion_kind
    losses = per_token.detach().double()
    counts = torch.ones_like(losses)
    if kind.has_causal_context:
        layout = batch.row.attention
        assert isinstance(layout, Tensor)
        # Where ranks share a row, keys of others precede its own tokens.
        stream = layout[Field.STREAM, -len(batch.row.token_ids) :]
        counts = (stream[batch.supervised] != CLEAN).double()
        figures[-4] = (losses * (1 - counts)).sum()
        figures[-3] = len(counts) - counts.sum()
    if stretches:
        block_size = objective.config.model.block_size
        position = batch.row.position_ids[batch.supervised] + int(kind.shifted)
        place = position % block_size * stretches // block_size
        figures.index_add_(0, place, losses * counts)
        figures.index_add_(0, place + POSITIONS, counts)
    tokens = len(inputs.hidden)
    if with_entropy and tokens:
        chosen = slice(None, None, -(-tokens // ENTROPIES))
        entropies = vocab_parallel_entropy(
            inputs.hidden.detach()[chosen],
            inputs.head.detach(),
            objective.vocab_size,
            inputs.tp_group,
        )
        figures[-2] = (entropies * counts[chosen]).sum()
        figures[-1] = counts[chosen].sum()
    return figures


def _stretches(objective: Objective) -> int:
    """Stretches that a block is counted in; 0 where there are no blocks."""
    config, kind = objective.config, objective.diffusion_kind
    is_diffusion = config.diffusion_kind is not None or config.traits.self_distillation
    if not is_diffusion or kind.attention_pattern != "block_causal":
        return 0
    return min(POSITIONS, config.model.block_size)


def loss_by_position(objective: Objective, sums: Sequence[float]) -> list[float | None] | None:
    """Mean loss in each stretch of a block, of the sum of all figures; None without blocks."""
    stretches = _stretches(objective)
    counts = sums[POSITIONS : POSITIONS + stretches]
    means = [total / count if count else None for total, count in zip(sums, counts, strict=False)]
    return means or None


def causal_loss(sums: Sequence[float]) -> float | None:
    """Mean loss of the autoregressive mode, of the sum of all figures; None without such losses."""
    total, count = sums[-4:-2]
    return total / count if count else None


def entropy(sums: Sequence[float]) -> float | None:
    """Mean entropy, of the sum of all figures; None where no rank had a token."""
    total, count = sums[-2:]
    return total / count if count else None
