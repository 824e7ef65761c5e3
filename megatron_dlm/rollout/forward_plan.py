"""The plan of one forward: which tokens it holds, and which draws follow it.

R: slots in use; S: tokens of a forward; n: draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatron_dlm.rollout.generation_config import GenerationConfig


@dataclass(frozen=True)
class SettingGroup:
    """Sequences of a forward that are decoded alike.

    Attributes:
        generation: How.
        draws: [m] int64 on the device, which draws are theirs; None: all.
        slots: [R] bool on the device, which slots are theirs; None: all.
    """

    generation: GenerationConfig
    draws: Tensor | None = None
    slots: Tensor | None = None


@dataclass(frozen=True)
class Verification:
    """Sequences of a forward whose drafts it verifies, decoded alike; V of them, B block columns.

    Attributes:
        generation: How.
        slots: [V] int64.
        rows: [V, B + 1] int64, index into S of the hidden state that predicts each column of the
            block, and of the first one after it.
        observed: [V] int64, columns that are final already.
        limit: [V] int64, columns that are final or hold a draft to verify.
        acceptance: [V, B] float64, the number that decides whether a draft is accepted.
        draws: [V, B + 1] float64, the number of the draw where the first columns were accepted.
        keeps_confidence: Whether the probability of each token is asked for.
    """

    generation: GenerationConfig
    slots: Tensor
    rows: Tensor
    observed: Tensor
    limit: Tensor
    acceptance: Tensor
    draws: Tensor
    keeps_confidence: bool = field(default=False, kw_only=True)

    @property
    def result_shape(self) -> torch.Size:
        """Of `verification.Verified` as a tensor: ids, then the confidence of each column."""
        slots, columns = self.rows.shape
        return torch.Size((2 + columns * self.keeps_confidence, slots))


@dataclass(frozen=True)
class ForwardPlan:
    """One forward pass over the slots and the draws that follow it.

    Tensors are on the device, int64 where nothing else is said.

    Attributes:
        starts: [R], first position of each slot in this forward; on the host, as `ends`.
        ends: [R], one past the last position; equal to the first where a prompt waits.
        noisy_starts: [R] on the host, first position of the block in decoding; the last one
            where there is none. Positions before it are final tokens.
        denoises: [R] bool on the host: slots that draw, whose prompt is prefilled.
        groups: Each sequence is in one of them.
        uniforms: [n] float64, the number of each draw.
        token_slots: [S], slots in ascending order.
        position_ids: [S].
        draw_rows: [n], index into S of the hidden state that each draw is made from.
        draw_slots: [n].
        draw_columns: [n], position of each draw within its block.
        draw_at: [R, B], which draw each position of a block has; without meaning where it has none.
        per_slot: [7, R]: whether it denoises, whether what it commits are drafts, denoising step,
            masked positions at the block's first step, start of the block, length of the prompt,
            end of the longest response.
        drafts: [m] int64, which draws are drafts; None: none.
        verifications: Of sequences with a drafted block; they draw nothing else.
        verified_slots: Theirs, [V] on the host, ascending.
        verified_drafts: Drafts of each of these, [V] on the host.
    """

    starts: np.ndarray
    ends: np.ndarray
    noisy_starts: np.ndarray
    denoises: np.ndarray
    groups: tuple[SettingGroup, ...]
    uniforms: Tensor
    token_slots: Tensor
    position_ids: Tensor
    draw_rows: Tensor
    draw_slots: Tensor
    draw_columns: Tensor
    draw_at: Tensor
    per_slot: Tensor
    drafts: Tensor | None = None
    verifications: tuple[Verification, ...] = ()
    verified_slots: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    verified_drafts: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    @property
    def read(self) -> Tensor | None:
        """[n], the tokens whose hidden states are read, those of the draws; None: all are."""
        if self.verifications or len(self.draw_rows) == len(self.token_slots):
            return None
        return self.draw_rows
