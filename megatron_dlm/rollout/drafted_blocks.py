"""Blocks of drafted tokens between two forwards: what the next one verifies, what remains after it.

V: verified sequences; B: positions of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.rollout.forward_plan import Verification
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.uniforms import counter_uniforms
from megatron_dlm.rollout.verification import Verified


@dataclass(frozen=True)
class DraftedBlocks:
    """Sequences that a forward verifies, on the host; each [V] int64.

    Attributes:
        slots: Ascending.
        first_rows: Index in the forward of the token before the block.
        block_start: First position of the block.
        observed: Columns that were final before the draft.
        drafts: Columns after these that hold a draft to verify.
        seeds: Of the draws.
        sample_index: Of the prompts.
        step: Of the block, counted from 1.
    """

    slots: np.ndarray
    first_rows: np.ndarray
    block_start: np.ndarray
    observed: np.ndarray
    drafts: np.ndarray
    seeds: np.ndarray
    sample_index: np.ndarray
    step: np.ndarray


def plan_verifications(
    blocks: DraftedBlocks,
    settings: Sequence[GenerationConfig],
    block_size: int,
    *,
    keeps_confidence: bool = False,
) -> tuple[Verification, ...]:
    """One for each distinct setting.

    Whether the draft at a position is accepted hangs on the number of (seed, sample, position,
    step), and the draw at a position on that of the negative step: no other draw has them.

    Args:
        blocks: The sequences.
        settings: Of each slot.
        block_size: B.
        keeps_confidence: Whether the probability of each token is asked for.
    """
    columns = np.arange(block_size + 1)
    position = blocks.block_start[:, None] + columns

    def numbers(sign: int) -> np.ndarray:
        counters = (
            blocks.seeds[:, None],
            blocks.sample_index[:, None],
            position,
            sign * blocks.step[:, None],
        )
        return counter_uniforms(*np.broadcast_arrays(*counters))

    acceptance, draws = numbers(1)[:, :-1], numbers(-1)
    # Columns before the observed ones are predicted by nothing that anybody reads.
    rows = np.maximum(blocks.first_rows[:, None] + columns, 0)
    planned = []
    of_slots = [settings[slot] for slot in blocks.slots]
    for generation in dict.fromkeys(of_slots):
        own = np.array([i for i, other in enumerate(of_slots) if other == generation])
        limit = blocks.observed + blocks.drafts
        arrays = (blocks.slots, rows, blocks.observed, limit, acceptance, draws)
        tensors = platform.to_device(*(torch.from_numpy(array[own]) for array in arrays))
        planned.append(Verification(generation, *tensors, keeps_confidence=keeps_confidence))
    return tuple(planned)


@dataclass(frozen=True)
class VerifiedBlocks:
    """Blocks after verification; on the device.

    Attributes:
        tokens: [V, B] int64, MASK after the last final token.
        masked: [V, B] bool, of the block that is drafted next: this one, or the next if it is full.
        is_full: [V] bool.
        is_finished: [V] bool, whether the response ends.
        is_new: [V, B + 1] bool, columns that this verification settled.
    """

    tokens: Tensor
    masked: Tensor
    is_full: Tensor
    is_finished: Tensor
    is_new: Tensor


def verified_blocks(
    tokens: Tensor,
    verification: Verification,
    verified: Verified,
    to_end: Tensor,
    *,
    mask_token_id: int,
    eos_token_ids: Tensor,
) -> VerifiedBlocks:
    """Blocks of which some tokens were verified.

    Args:
        tokens: [V, B] int64 with the drafts.
        verification: What was verified.
        verified: With which result.
        to_end: [V] int64, positions from the block's first to the end of the longest response.
        mask_token_id: Id of MASK.
        eos_token_ids: On the device.
    """
    size = tokens.shape[1]
    columns = torch.arange(size, device=tokens.device)
    final, drawn = verified.num_final[:, None], verified.next_token[:, None]
    block = tokens.where(columns < final, mask_token_id).where(columns != final, drawn)
    filled = torch.minimum(final[:, 0] + 1, to_end)
    is_new = (columns >= verification.observed[:, None]) & (columns < filled[:, None])
    is_eos = torch.isin(block, eos_token_ids) & is_new
    ends_next = (filled > size) & torch.isin(verified.next_token, eos_token_ids)
    is_full = filled >= size
    every = torch.arange(size + 1, device=tokens.device)
    return VerifiedBlocks(
        tokens=block,
        masked=columns >= torch.where(is_full, filled - size, filled)[:, None],
        is_full=is_full,
        is_finished=is_eos.any(dim=-1) | ends_next | (filled >= to_end),
        is_new=(every >= verification.observed[:, None]) & (every < filled[:, None]),
    )
