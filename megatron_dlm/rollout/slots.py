"""State of the sequences in decoding, and the plan of their next forward.

Tokens, denoising steps and masks live on the device, which also decides what is committed and which
sequences end. The host knows where each sequence is, plans the next forward from that, and learns
of the rest from one small tensor a step (`SlotTable.commit`). Slots 0 to R - 1 are in use; when a
sequence ends, the last slot moves into its place, so the slots in use stay contiguous.

R: slots in use; B: positions of a block (its size, or the longest response where that is decoded as
a whole); T: positions of a slot; S: tokens of a forward; n: draws.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.rollout.block_grid import first_block, sequence_length
from megatron_dlm.rollout.context import RolloutContext
from megatron_dlm.rollout.forward_plan import ForwardPlan, SettingGroup
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.sampling import SampledTokens
from megatron_dlm.rollout.strategies import DenoisedBlocks
from megatron_dlm.rollout.uniforms import counter_uniforms, signed
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Prompt, Trajectory


class SlotTable:
    """State of the sequences in decoding.

    With a cache, a slot's next forward covers the positions from `_start`, the first whose keys are
    not final in it, to the end of the block in decoding: what is left of the prompt's complete
    blocks at first, the block just finished on the first forward of each later block, nothing else
    on the others. A prompt of more than `chunked_prefill_size` tokens is prefilled in pieces of
    that size, each in a forward without draws for it but the last; a forward holds no more prompt
    tokens than that, so others wait for a later one. Under full attention every forward covers the
    canvas (prompt and longest response): positions after the block in decoding are MASK, and the
    last block ends with the canvas.

    Args:
        num_slots: Sequences held at once.
        max_length: Most positions of a sequence, see `sequence_length`.
        max_response_length: Tokens after which a response is cut; a `Prompt` may have a lower
            limit.
        config: Decoding settings, of sequences that are placed without their own.
        special_tokens: Each of `eos_token_ids` ends a response; MASK stands for tokens not
            committed yet.
        seed: Of the draws, of sequences that are placed without their own.
        keeps_confidence: Whether trajectories have `confidence`.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        max_length: int,
        max_response_length: int,
        config: GenerationConfig,
        special_tokens: SpecialTokens,
        seed: int,
        keeps_confidence: bool = False,
    ) -> None:
        self.num_slots = num_slots
        self.num_active = 0
        self._config = config
        self._seed = seed
        self._keeps_confidence = keeps_confidence
        self._max_response_length = max_response_length
        self._mask_token_id = special_tokens.mask_token_id
        self._block_size = config.block_size or max_response_length
        # Pieces end with blocks.
        blocks = max(config.chunked_prefill_size // self._block_size, 1)
        self._chunk = blocks * self._block_size
        self._settings = [config] * num_slots
        self._prompts: list[Prompt | None] = [None] * num_slots
        self._requests = [0] * num_slots
        self._placed = 0

        device = platform.device()
        self._end_ids = torch.tensor(special_tokens.eos_token_ids)
        self._eos_token_ids = self._end_ids.to(device)
        self._columns = torch.arange(self._block_size, device=device)
        # On the device: what the network sees and writes.
        shape = (num_slots, max_length)
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self._unmask_step = torch.zeros(shape, dtype=torch.int64, device=device)
        self._masked = torch.zeros(num_slots, self._block_size, dtype=torch.bool, device=device)
        # On the host: blocks as the device reported them, and where each sequence is.
        self._known_tokens = np.zeros(shape, dtype=np.int64)
        self._known_step = np.zeros(shape, dtype=np.int64)
        columns = max_length if keeps_confidence else 0
        self._known_confidence = np.zeros((num_slots, columns), dtype=np.float32)
        self._known_masked = np.zeros((num_slots, self._block_size), dtype=bool)

        def per_slot() -> np.ndarray:
            return np.zeros(num_slots, dtype=np.int64)

        self._order = per_slot()  # of admission
        self._seeds = per_slot()
        self._prompt_length = per_slot()
        self._end = per_slot()  # of prompt and longest response
        self._sample_index = per_slot()
        self._start = per_slot()
        self._block_start = per_slot()
        self._step = per_slot()
        self._masked_at_start = per_slot()
        self._forwards = per_slot()
        self._prefilling = np.zeros(num_slots, dtype=bool)
        self._per_slot: tuple[np.ndarray | Tensor, ...] = (
            self._tokens,
            self._unmask_step,
            self._masked,
            self._known_tokens,
            self._known_step,
            self._known_confidence,
            self._known_masked,
            self._order,
            self._seeds,
            self._prompt_length,
            self._end,
            self._sample_index,
            self._start,
            self._block_start,
            self._step,
            self._masked_at_start,
            self._forwards,
            self._prefilling,
        )

    def length(self, prompt: Prompt) -> int:
        """Positions of a prompt and its longest response, in whole blocks."""
        return sequence_length(prompt, self._config, self._max_response_length)

    @property
    def _has_canvas(self) -> bool:
        """Whether a forward covers positions after the block in decoding."""
        return self._config.attention_pattern == "full"

    def request(self, slot: int) -> int:
        """The index that the sequence in a slot was placed with."""
        return self._requests[slot]

    def slot_of(self, request: int) -> int | None:
        """Where the sequence that was placed with this index is; None if it has ended."""
        active = self._requests[: self.num_active]
        return active.index(request) if request in active else None

    def place(
        self,
        request: int,
        prompt: Prompt,
        generation: GenerationConfig | None = None,
        seed: int | None = None,
    ) -> None:
        """Start decoding a prompt in the first unused slot.

        Args:
            request: Index of the sequence.
            prompt: What to decode.
            generation: Its own settings, of the table's block size and attention.
            seed: Of its own draws.
        """
        slot, known, length = self.num_active, prompt.known_ids, len(prompt.token_ids)
        block_start = first_block(known, self._config)
        masked = block_start + np.arange(self._block_size) >= len(known)
        self._end[slot] = length + prompt.response_limit(self._max_response_length)
        if self._has_canvas:
            masked &= block_start + np.arange(self._block_size) < self._end[slot]
        tokens, on_device = platform.to_device(known, torch.from_numpy(masked.astype(np.int64)))
        self._tokens[slot, : len(known)] = tokens
        self._tokens[slot, len(known) :] = self._mask_token_id
        self._masked[slot] = on_device.bool()
        self._prompts[slot], self._requests[slot] = prompt, request
        self._settings[slot] = self._config if generation is None else generation
        self._seeds[slot] = signed(self._seed if seed is None else seed)
        self._known_masked[slot] = masked
        self._known_confidence[slot] = 0
        if prompt.beginning is not None:
            decoded = slice(length, len(known))
            self._known_tokens[slot, decoded] = prompt.beginning.response_ids
            self._known_step[slot, decoded] = prompt.beginning.unmask_step
        self._order[slot] = self._placed
        self._prompt_length[slot] = length
        self._sample_index[slot] = prompt.sample_index
        self._start[slot] = 0
        self._block_start[slot] = block_start
        self._step[slot] = 1
        self._masked_at_start[slot] = masked.sum()
        self._forwards[slot] = 0
        self._prefilling[slot] = not self._has_canvas
        self._placed += 1
        self.num_active += 1

    def remove(self, slot: int) -> int | None:
        """Free a slot.

        Returns:
            The slot whose sequence moved into this one (its cache must move too), or None.
        """
        self.num_active -= 1
        last = self.num_active
        self._prompts[slot] = self._prompts[last]
        self._requests[slot] = self._requests[last]
        self._settings[slot] = self._settings[last]
        self._prompts[last] = None
        if slot == last:
            return None
        for state in self._per_slot:
            state[slot] = state[last]
        return last

    def plan(self, context: RolloutContext) -> ForwardPlan:
        """Lay out the next forward of all slots in use.

        Args:
            context: Asked for what of a prompt is computed already, and told what will be.
        """
        active = slice(self.num_active)
        block_start = self._block_start[active]
        if self._has_canvas:
            ends = self._end[active].copy()
        elif self._config.is_autoregressive:
            ends = block_start.copy()
        else:
            ends = block_start + self._block_size
        denoises = self._prefill(ends, context)
        starts = self._start[active].copy()
        lengths = ends - starts
        offsets = lengths.cumsum() - lengths
        slots = np.repeat(np.arange(self.num_active), lengths)
        positions = np.arange(len(slots)) + (starts - offsets)[slots]
        draw_slots, draw_columns = (self._known_masked[active] & denoises[:, None]).nonzero()
        draw_position = block_start[draw_slots] + draw_columns
        source = draw_position - 1 if self._config.shifted else draw_position
        per_slot = np.stack(
            (
                denoises,
                self._step[active],
                self._masked_at_start[active],
                block_start,
                self._prompt_length[active],
                self._end[active],
            )
        )
        arrays = (
            slots,
            positions,
            source + (offsets - starts)[draw_slots],
            draw_slots,
            draw_columns,
            per_slot,
        )
        counters = (
            self._seeds[draw_slots],
            self._sample_index[draw_slots],
            draw_position,
            self._step[draw_slots],
        )
        uniforms = counter_uniforms(*map(torch.from_numpy, counters))
        members = self._members(draw_slots)
        of_groups = [array for group in members.values() for array in group]
        uniforms, *tensors = platform.to_device(
            uniforms, *map(torch.from_numpy, (*arrays, *of_groups))
        )
        first = len(arrays)
        groups = tuple(
            SettingGroup(generation, draws, slots.bool())
            for generation, draws, slots in zip(
                members, tensors[first::2], tensors[first + 1 :: 2], strict=True
            )
        )
        return ForwardPlan(
            starts,
            ends,
            denoises,
            groups or (SettingGroup(self._settings[0]),),
            uniforms,
            *tensors[:first],
        )

    def _members(self, draw_slots: np.ndarray) -> dict[GenerationConfig, list[np.ndarray]]:
        """Draws [m] and slots [R] (1 for a member) by setting; empty where all have the same."""
        settings = self._settings[: self.num_active]
        distinct = list(dict.fromkeys(settings))
        if len(distinct) == 1:
            return {}
        number = np.array([distinct.index(generation) for generation in settings])
        return {
            generation: [
                (number[draw_slots] == group).nonzero()[0],
                (number == group).astype(np.int64),
            ]
            for group, generation in enumerate(distinct)
        }

    def _prefill(self, ends: np.ndarray, context: RolloutContext) -> np.ndarray:
        """Shorten `ends` where a prompt is not prefilled by this forward; who denoises, [R]."""
        denoises = np.ones(self.num_active, dtype=bool)
        prefilling = self._prefilling[: self.num_active].nonzero()[0]
        last = 1 if self._config.is_autoregressive else self._block_size
        room = self._chunk
        for slot in prefilling[self._order[prefilling].argsort()].tolist():
            complete = int(ends[slot]) - last
            start = self._start[slot] = context.reuse(slot, int(self._start[slot]))
            end = min((start // self._chunk + 1) * self._chunk, complete)
            # A piece waits until it fits as a whole: how a prompt is cut depends on nothing else.
            if end - start > room:
                end, denoises[slot] = start, False
            elif end < complete:
                denoises[slot] = False
            room -= end - start
            if denoises[slot]:
                self._prefilling[slot] = False
            else:
                ends[slot] = end
            context.publish(slot, end)
        return denoises

    def tokens(self, plan: ForwardPlan) -> Tensor:
        """Tokens of a forward, [S] int64, MASK where not committed yet."""
        return self._tokens[plan.token_slots, plan.position_ids]

    def commit(self, plan: ForwardPlan, sampled: SampledTokens) -> Tensor:
        """Commit drawn tokens and open the next blocks, on the device.

        Args:
            plan: What `plan` returned.
            sampled: The draws.

        Returns:
            [R, 3 B + 2] int32 on the device: tokens, denoising steps and, for the next forward,
            masks of each block; whether the block is full; whether the sequence is finished. Where
            confidence is kept, B columns before the last two have the bits of its float32, zero for
            tokens that this forward did not commit.
        """
        active = slice(self.num_active)
        denoises, step, masked_at_start, block_start, prompt_length, end = plan.per_slot
        where = (plan.draw_slots, plan.draw_columns)
        masked = self._masked[active] & denoises.bool()[:, None]
        shape, device = masked.shape, masked.device
        blocks = DenoisedBlocks(
            masked=masked,
            confidence=torch.zeros(shape, device=device).index_put_(where, sampled.confidence),
            entropy=torch.zeros(shape, device=device).index_put_(where, sampled.entropy),
            step=step,
            masked_at_start=masked_at_start,
        )
        committed = torch.zeros_like(masked)
        for group in plan.groups:
            generation = group.generation
            own = generation.strategy.commit(blocks, generation.strategy_value)
            committed = own if group.slots is None else own.where(group.slots[:, None], committed)
        positions = block_start[:, None] + self._columns
        tokens, steps = self._tokens[active], self._unmask_step[active]
        block = tokens.gather(1, positions)
        drawn = block.index_put(where, sampled.token_ids)
        block = torch.where(committed, drawn, block)
        tokens.scatter_(1, positions, block)
        unmask_step = torch.where(committed, step[:, None], steps.gather(1, positions))
        steps.scatter_(1, positions, unmask_step)

        masked = self._masked[active] & ~committed
        full = ~masked.any(dim=-1)
        is_eos = torch.isin(block, self._eos_token_ids) & (positions >= prompt_length[:, None])
        finished = full & (is_eos.any(dim=-1) | (block_start + self._block_size >= end))
        opened = (full & ~finished)[:, None].expand_as(masked)
        if self._has_canvas:
            opened = opened & (positions + self._block_size < end[:, None])
        masked |= opened
        self._masked[active] = masked
        columns = [block, unmask_step, masked]
        if self._keeps_confidence:
            columns.append((blocks.confidence * committed).view(torch.int32))
        columns.append(torch.stack((full, finished), dim=1))
        return torch.cat(columns, dim=1).int()

    def settle(self, plan: ForwardPlan, report: np.ndarray) -> list[int]:
        """Take over what the device reported.

        Args:
            plan: The plan of that forward.
            report: What `commit` returned, on the host.

        Returns:
            Slots whose sequence is finished, ascending; for `trajectory`, then `remove`.
        """
        active, size = slice(self.num_active), self._block_size
        self._known_masked[active] = report[:, 2 * size : 3 * size]
        self._forwards[active] += plan.denoises
        self._step[active] += plan.denoises
        if self._config.is_autoregressive:
            self._start[active] = plan.ends
        elif not self._has_canvas:
            # Keys before the block are final now; its own become final once it is clean.
            self._start[active] = np.where(plan.denoises, self._block_start[active], plan.ends)
        full, finished = report[:, -2].nonzero()[0], report[:, -1].nonzero()[0]
        where = (
            np.arange(self.num_active)[:, None],
            self._block_start[active, None] + np.arange(size),
        )
        self._known_tokens[where] = report[:, :size]
        self._known_step[where] = report[:, size : 2 * size]
        if self._keeps_confidence:
            bits = np.ascontiguousarray(report[:, 3 * size : 4 * size])
            self._known_confidence[where] += bits.view(np.float32)
        opened = full[report[full, -1] == 0]
        self._block_start[opened] += size
        self._step[opened] = 1
        self._masked_at_start[opened] = self._known_masked[opened].sum(axis=-1)
        return [int(slot) for slot in finished]

    def settled(self, slot: int) -> np.ndarray:
        """Tokens of the response in finished blocks, [n]; what follows EOS is among them."""
        first, end = self._prompt_length[slot], self._block_start[slot]
        return self._known_tokens[slot, first:end]

    def block(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """The response in the block that is not finished: tokens [n], and which are MASK [n]."""
        start, end = self._block_start[slot], self._end[slot]
        shown = slice(max(start, self._prompt_length[slot]), min(start + self._block_size, end))
        columns = slice(shown.start - start, shown.stop - start)
        return self._known_tokens[slot, shown], self._known_masked[slot, columns]

    def forwards(self, slot: int) -> int:
        """Forwards so far that drew tokens for the sequence of a slot."""
        return int(self._forwards[slot])

    def trajectory(self, slot: int) -> Trajectory:
        """The trajectory decoded in a finished slot."""
        end = int(self._block_start[slot]) + self._block_size
        if self._has_canvas:
            end = min(end, int(self._end[slot]))
        return self._trajectory(slot, end, int(self._forwards[slot]))

    def unfinished(self, slot: int) -> Trajectory:
        """The blocks decoded so far, of a sequence under block-causal attention."""
        # The block in decoding begins anew, its steps too.
        forwards = int(self._forwards[slot] - self._step[slot] + 1)
        trajectory = self._trajectory(slot, int(self._block_start[slot]), forwards)
        return replace(trajectory, finish_reason="unfinished")

    def _trajectory(self, slot: int, end: int, forwards: int) -> Trajectory:
        """The trajectory of a slot up to a position, `forwards` of this rollout."""
        prompt = self._prompts[slot]
        assert prompt is not None
        decoded = slice(len(prompt.token_ids), end)
        tokens = torch.from_numpy(self._known_tokens[slot, decoded].copy())
        unmask_step = torch.from_numpy(self._known_step[slot, decoded].copy())
        if self._config.is_autoregressive:
            unmask_step.zero_()
        confidence = None
        if self._keeps_confidence:
            confidence = torch.from_numpy(self._known_confidence[slot, decoded].copy())
        length = min(prompt.response_limit(self._max_response_length), len(tokens))
        eos = torch.isin(tokens[:length], self._end_ids).nonzero()
        if len(eos):
            length = int(eos[0]) + 1
        before = prompt.beginning
        return Trajectory(
            sample_index=prompt.sample_index,
            prompt_ids=prompt.token_ids,
            response_ids=tokens[:length],
            unmask_step=unmask_step[:length],
            tail_ids=tokens[length:],
            tail_unmask_step=unmask_step[length:],
            finish_reason="eos" if len(eos) else "length",
            canvas_length=int(self._end[slot]) if self._has_canvas else None,
            denoising_forwards=forwards + (before.denoising_forwards if before else 0),
            total_forwards=forwards
            + self._prefill_forwards(prompt)
            + (before.total_forwards if before else 0),
            confidence=confidence,
            rollouts=1 + (before.rollouts if before else 0),
            record=prompt.record,
        )

    def _prefill_forwards(self, prompt: Prompt) -> int:
        """Forwards without draws that a prompt takes where nothing of it is shared.

        The last piece of a prompt, and what commits a block, travel in denoising forwards.
        """
        if self._has_canvas:
            return 0
        complete = first_block(prompt.known_ids, self._config)
        complete -= int(self._config.is_autoregressive)
        return max(-(-complete // self._chunk) - 1, 0)
