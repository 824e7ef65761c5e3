"""State of the sequences in decoding, and the plan of their next forward.

All state lives in small CPU tensors with one row per slot. Slots 0 to R - 1 are in use; when a
sequence ends and none waits, the last slot moves into its place, so the slots in use stay
contiguous.

R: slots in use; B: positions of a block (its size, or the longest response where that is decoded as
a whole); T: positions of a slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.sampling import SampledTokens
from megatron_dlm.rollout.strategies import DenoisedBlocks
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Prompt, Trajectory


@dataclass(frozen=True)
class ForwardPlan:
    """One forward pass over all slots and the draws that follow it.

    Attributes:
        token_ids: [S] int64, slots in ascending order, MASK where not committed yet.
        position_ids: [S] int64.
        starts: [R] int64, first position of each slot in this forward.
        ends: [R] int64, one past the last position.
        draw_rows: [n] int64, index into S of the hidden state that each draw is made from.
        draw_slots: [n] int64.
        draw_columns: [n] int64, position of each draw within its block.
        sample_index: [n] int64.
        position: [n] int64, position of each draw in its sequence.
        denoising_step: [n] int64.
    """

    token_ids: Tensor
    position_ids: Tensor
    starts: Tensor
    ends: Tensor
    draw_rows: Tensor
    draw_slots: Tensor
    draw_columns: Tensor
    sample_index: Tensor
    position: Tensor
    denoising_step: Tensor


class SlotTable:
    """State of the sequences in decoding.

    With a cache, a slot's next forward covers the positions from `_start`, the first whose keys are
    not final in it, to the end of the block in decoding: the prompt's complete blocks on the first
    forward, the block just finished on the first of each later block, nothing else on the others.
    Under full attention every forward covers the canvas (prompt and longest response): positions
    after the block in decoding are MASK, and the last block ends with the canvas.

    Args:
        num_slots: Sequences held at once.
        prompts: All prompts that will be placed.
        max_response_length: Tokens after which a response is cut; a `Prompt` may have a lower
            limit.
        config: Decoding settings.
        special_tokens: Each of `eos_token_ids` ends a response; MASK stands for tokens not
            committed yet.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        prompts: Sequence[Prompt],
        max_response_length: int,
        config: GenerationConfig,
        special_tokens: SpecialTokens,
    ) -> None:
        self.num_slots = num_slots
        self.num_active = 0
        self._config = config
        self._max_response_length = max_response_length
        self._eos_token_ids = torch.tensor(special_tokens.eos_token_ids)
        self._mask_token_id = special_tokens.mask_token_id
        self._block_size = config.block_size or max_response_length
        self._columns = torch.arange(self._block_size)
        longest = max((len(p.token_ids) + self._limit(p) for p in prompts), default=0)
        # In whole blocks, also past the end of a canvas.
        blocks = -(-longest // self._block_size)
        self.max_length = blocks * self._block_size
        self._prompts: list[Prompt | None] = [None] * num_slots
        self._requests = [0] * num_slots

        def per_slot() -> Tensor:
            return torch.zeros(num_slots, dtype=torch.int64)

        self._tokens = torch.zeros(num_slots, self.max_length, dtype=torch.int64)
        self._unmask_step = torch.zeros(num_slots, self.max_length, dtype=torch.int64)
        self._masked = torch.zeros(num_slots, self._block_size, dtype=torch.bool)
        self._prompt_length = per_slot()
        self._end = per_slot()  # of prompt and longest response
        self._sample_index = per_slot()
        self._start = per_slot()
        self._block_start = per_slot()
        self._step = per_slot()
        self._masked_at_start = per_slot()
        self._forwards = per_slot()
        self._per_slot = (
            self._tokens,
            self._unmask_step,
            self._masked,
            self._prompt_length,
            self._end,
            self._sample_index,
            self._start,
            self._block_start,
            self._step,
            self._masked_at_start,
            self._forwards,
        )

    def _limit(self, prompt: Prompt) -> int:
        return prompt.response_limit(self._max_response_length)

    @property
    def _has_canvas(self) -> bool:
        """Whether a forward covers positions after the block in decoding."""
        return self._config.attention_pattern == "full"

    def request(self, slot: int) -> int:
        """The index that the sequence in a slot was placed with."""
        return self._requests[slot]

    def place(self, slot: int, request: int, prompt: Prompt) -> None:
        """Start decoding a prompt, in the slot of a finished sequence or the first unused one."""
        length = len(prompt.token_ids)
        # A response that is decoded as a whole is one block, wherever the prompt ends.
        grid = self._config.block_size
        first_block = length if grid is None else length // grid * grid
        self._prompts[slot], self._requests[slot] = prompt, request
        self._tokens[slot, :length] = prompt.token_ids
        self._tokens[slot, length:] = self._mask_token_id
        self._prompt_length[slot] = length
        self._end[slot] = length + self._limit(prompt)
        self._sample_index[slot] = prompt.sample_index
        self._start[slot] = 0
        self._forwards[slot] = 0
        self._open_blocks(torch.tensor([slot]), torch.tensor([first_block]))
        self.num_active = max(self.num_active, slot + 1)

    def _open_blocks(self, slots: Tensor, block_start: Tensor) -> None:
        positions = block_start[:, None] + self._columns
        prompt_length = self._prompt_length[slots, None]
        masked = positions >= prompt_length
        if self._has_canvas:
            masked &= positions < self._end[slots, None]
        self._block_start[slots] = block_start
        self._masked[slots] = masked
        self._masked_at_start[slots] = masked.sum(dim=-1)
        self._step[slots] = 1

    def remove(self, slot: int) -> int | None:
        """Free a finished slot.

        Returns:
            The slot whose sequence moved into this one (its cache must move too), or None.
        """
        self.num_active -= 1
        last = self.num_active
        self._prompts[slot] = self._prompts[last]
        self._requests[slot] = self._requests[last]
        self._prompts[last] = None
        if slot == last:
            return None
        for tensor in self._per_slot:
            tensor[slot] = tensor[last]
        return last

    def plan(self) -> ForwardPlan:
        """Lay out the next forward of all slots in use."""
        active = slice(self.num_active)
        starts, block_start = self._start[active], self._block_start[active]
        if self._has_canvas:
            ends = self._end[active]
        elif self._config.is_autoregressive:
            ends = block_start
        else:
            ends = block_start + self._block_size
        lengths = ends - starts
        offsets = lengths.cumsum(0) - lengths
        slots = torch.repeat_interleave(lengths)
        positions = torch.arange(len(slots)) + (starts - offsets)[slots]
        draw_slots, draw_columns = self._masked[active].nonzero(as_tuple=True)
        draw_position = block_start[draw_slots] + draw_columns
        source = draw_position - 1 if self._config.shifted else draw_position
        return ForwardPlan(
            token_ids=self._tokens[slots, positions],
            position_ids=positions,
            starts=starts.clone(),
            ends=ends.clone(),
            draw_rows=source + (offsets - starts)[draw_slots],
            draw_slots=draw_slots,
            draw_columns=draw_columns,
            sample_index=self._sample_index[draw_slots],
            position=draw_position,
            denoising_step=self._step[draw_slots],
        )

    def update(self, plan: ForwardPlan, sampled: SampledTokens) -> list[int]:
        """Commit drawn tokens and open the next blocks.

        Args:
            plan: What `plan` returned.
            sampled: The draws, on the CPU.

        Returns:
            Slots whose sequence is finished, ascending; for `trajectory`, then `place` or `remove`.
        """
        active = slice(self.num_active)
        masked = self._masked[active]
        where = (plan.draw_slots, plan.draw_columns)
        blocks = DenoisedBlocks(
            masked=masked,
            confidence=torch.zeros(masked.shape).index_put_(where, sampled.confidence),
            entropy=torch.zeros(masked.shape).index_put_(where, sampled.entropy),
            step=self._step[active],
            masked_at_start=self._masked_at_start[active],
        )
        config = self._config
        committed = config.strategy.commit(blocks, config.strategy_value)[where]
        slots, positions = plan.draw_slots[committed], plan.position[committed]
        self._tokens[slots, positions] = sampled.token_ids[committed]
        self._unmask_step[slots, positions] = plan.denoising_step[committed]
        masked[slots, plan.draw_columns[committed]] = False
        self._forwards[active] += 1
        self._step[active] += 1
        if self._config.is_autoregressive:
            self._start[active] = plan.ends
        elif not self._has_canvas:
            # Keys before the block are final now; its own become final once it is clean.
            self._start[active] = self._block_start[active]

        full = (~masked.any(dim=-1)).nonzero()[:, 0]
        if not len(full):
            return []
        block_start = self._block_start[full]
        block_end = block_start + self._block_size
        positions = block_start[:, None] + self._columns
        is_eos = torch.isin(self._tokens[full[:, None], positions], self._eos_token_ids)
        is_eos &= positions >= self._prompt_length[full, None]
        finished = is_eos.any(dim=-1) | (block_end >= self._end[full])
        self._open_blocks(full[~finished], block_end[~finished])
        return full[finished].tolist()

    def trajectory(self, slot: int) -> Trajectory:
        """The trajectory decoded in a finished slot."""
        prompt = self._prompts[slot]
        assert prompt is not None
        prompt_length = int(self._prompt_length[slot])
        end = int(self._block_start[slot]) + self._block_size
        canvas_length = None
        if self._has_canvas:
            canvas_length = int(self._end[slot])
            end = min(end, canvas_length)
        tokens = self._tokens[slot, prompt_length:end].clone()
        unmask_step = self._unmask_step[slot, prompt_length:end].clone()
        if self._config.is_autoregressive:
            unmask_step.zero_()
        length = min(self._limit(prompt), len(tokens))
        eos = torch.isin(tokens[:length], self._eos_token_ids).nonzero()
        if len(eos):
            length = int(eos[0]) + 1
        forwards = int(self._forwards[slot])
        return Trajectory(
            sample_index=prompt.sample_index,
            prompt_ids=prompt.token_ids,
            response_ids=tokens[:length],
            unmask_step=unmask_step[:length],
            tail_ids=tokens[length:],
            tail_unmask_step=unmask_step[length:],
            finish_reason="eos" if len(eos) else "length",
            canvas_length=canvas_length,
            denoising_forwards=forwards,
            # Prefill and commits travel in denoising forwards; none is made for them alone.
            total_forwards=forwards,
            record=prompt.record,
        )
