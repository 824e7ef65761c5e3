"""The plan of one forward: which tokens it holds, and which draws follow it.

R: slots in use; S: tokens of a forward; n: draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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
class ForwardPlan:
    """One forward pass over the slots and the draws that follow it.

    Tensors are on the device, int64 where nothing else is said.

    Attributes:
        starts: [R], first position of each slot in this forward; on the host, as `ends`.
        ends: [R], one past the last position; equal to the first where a prompt waits.
        denoises: [R] bool on the host: slots that draw, whose prompt is prefilled.
        groups: Each sequence is in one of them.
        uniforms: [n] float64, the number of each draw.
        token_slots: [S], slots in ascending order.
        position_ids: [S].
        draw_rows: [n], index into S of the hidden state that each draw is made from.
        draw_slots: [n].
        draw_columns: [n], position of each draw within its block.
        per_slot: [6, R]: whether it denoises, denoising step, masked positions at the block's
            first step, start of the block, length of the prompt, end of the longest response.
    """

    starts: np.ndarray
    ends: np.ndarray
    denoises: np.ndarray
    groups: tuple[SettingGroup, ...]
    uniforms: Tensor
    token_slots: Tensor
    position_ids: Tensor
    draw_rows: Tensor
    draw_slots: Tensor
    draw_columns: Tensor
    per_slot: Tensor
