"""The plan of the next forward of the sequences in decoding, and what it has changed.

Tokens and masks live on the device, which also decides what is committed and which sequences end.
The host knows where each sequence is, plans the next forward from that, and learns of the rest from
one small tensor a step (`SlotTable.commit`). Slots 0 to R - 1 are in use; when a sequence ends, the
last slot moves into its place, so the slots in use stay contiguous.

R: slots in use; B: positions of a block (its size, or the longest response where that is decoded as
a whole); T: positions of a slot; S: tokens of a forward; n: draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_dlm import platform
from megatron_dlm.rollout.context import RolloutContext
from megatron_dlm.rollout.drafted_blocks import (
    DraftedBlocks,
    plan_verifications,
    verified_blocks,
)
from megatron_dlm.rollout.forward_plan import ForwardPlan, SettingGroup, Verification
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.sampling import SampledTokens
from megatron_dlm.rollout.slot_state import SlotState
from megatron_dlm.rollout.strategies import DenoisedBlocks
from megatron_dlm.rollout.uniforms import counter_uniforms
from megatron_dlm.rollout.verification import Verified
from megatron_dlm.types.trajectory import VerificationRound


class SlotTable(SlotState):
    """Plans forwards of the sequences in decoding, and takes over their results.

    With a cache, a slot's next forward covers the positions from `_start`, the first whose keys are
    not final in it, to the end of the block in decoding: what is left of the prompt's complete
    blocks at first, the block just finished on the first forward of each later block, nothing else
    on the others. A prompt of more than `chunked_prefill_size` tokens is prefilled in pieces of
    that size, each in a forward without draws for it but the last; a forward holds no more prompt
    tokens than that, so others wait for a later one. Under full attention every forward covers the
    canvas (prompt and longest response): positions after the block in decoding are MASK, and the
    last block ends with the canvas.

    Where drafts are verified, one or several forwards fill the block with drafts, and the next one
    holds it as final tokens, together with the token before the first draft. The drafts that were
    not accepted are MASK again. The first token of a block may be known before its first draft. The
    last token of a block or response is not drafted: to draw it takes one forward as well.
    """

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
        verifies = self._verifies[active]
        observed = self._block_size - self._masked_at_start[active]
        drafts = np.minimum(self._end[active] - block_start, self._block_size) - observed
        is_drafted = (drafts == 1) | ~self._known_masked[active].any(axis=-1)
        verifying = denoises & verifies & is_drafted
        draws = self._known_masked[active] & (denoises & ~verifying)[:, None]
        draw_slots, draw_columns = draws.nonzero()
        draw_position = block_start[draw_slots] + draw_columns
        source = draw_position - 1 if self._config.shifted else draw_position
        per_slot = np.stack(
            (
                denoises,
                verifies,
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
            draws.cumsum().reshape(draws.shape) - 1,
            per_slot,
        )
        counters = (
            self._seeds[draw_slots],
            self._sample_index[draw_slots],
            draw_position,
            self._step[draw_slots],
        )
        uniforms = torch.from_numpy(counter_uniforms(*counters))
        members = self._members(draw_slots)
        of_groups = [array for group in members.values() for array in group]
        uniforms, *tensors = platform.to_device(
            uniforms, *map(torch.from_numpy, (*arrays, *of_groups))
        )
        first = len(arrays)
        drafted = verifies[draw_slots].nonzero()[0]
        verified = verifying.nonzero()[0]
        verified_drafts = np.where(drafts == 1, 0, drafts)[verified]
        groups = tuple(
            SettingGroup(generation, draws, slots.bool())
            for generation, draws, slots in zip(
                members, tensors[first::2], tensors[first + 1 :: 2], strict=True
            )
        )
        token_slots, position_ids, draw_rows, draws_of, columns, draw_at, on_device = tensors[
            :first
        ]
        return ForwardPlan(
            starts=starts,
            ends=ends,
            noisy_starts=np.where(verifying, ends, np.minimum(block_start, ends)),
            denoises=denoises,
            groups=groups or (SettingGroup(self._settings[0]),),
            uniforms=uniforms,
            token_slots=token_slots,
            position_ids=position_ids,
            draw_rows=draw_rows,
            draw_slots=draws_of,
            draw_columns=columns,
            draw_at=draw_at,
            per_slot=on_device,
            drafts=platform.to_device(torch.from_numpy(drafted))[0] if len(drafted) else None,
            verifications=self._verifications(verified, verified_drafts, offsets - starts),
            verified_slots=verified,
            verified_drafts=verified_drafts,
        )

    def _verifications(
        self, slots: np.ndarray, drafts: np.ndarray, shift: np.ndarray
    ) -> tuple[Verification, ...]:
        """What a forward verifies, whose row of a slot's position is `shift` [R] further."""
        if not len(slots):
            return ()
        blocks = DraftedBlocks(
            slots=slots,
            first_rows=(self._block_start[: self.num_active] - 1 + shift)[slots],
            block_start=self._block_start[slots],
            observed=self._block_size - self._masked_at_start[slots],
            drafts=drafts,
            seeds=self._seeds[slots],
            sample_index=self._sample_index[slots],
            step=self._step[slots],
        )
        return plan_verifications(
            blocks,
            self._settings,
            self._block_size,
            keeps_confidence=self._keeps_confidence,
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

    def blocks(self, plan: ForwardPlan) -> Tensor:
        """Tokens of the block in decoding of each slot, [R, B] int64."""
        positions = plan.per_slot[4][:, None] + self._columns
        return self._tokens[: self.num_active].gather(1, positions)

    def commit(
        self, plan: ForwardPlan, sampled: SampledTokens, verified: Sequence[Verified] = ()
    ) -> Tensor:
        """Commit drawn tokens and open the next blocks, on the device.

        Args:
            plan: What `plan` returned.
            sampled: The draws.
            verified: Results of the plan's verifications.

        Returns:
            [R, 2 B + 4] int32 on the device: tokens and, for the next forward, masks of each
            block; of a verified block, the columns before the token that was drawn, and that token;
            whether the block is full; whether the sequence is finished. Where confidence is kept,
            B + 1 columns before the last four have the bits of its float32, of the block and the
            token after it, zero for tokens that this forward did not commit.
        """
        active = slice(self.num_active)
        denoises, verifies, step, masked_at_start, block_start, prompt_length, end = plan.per_slot
        masked = self._masked[active] & denoises.bool()[:, None]
        positions = block_start[:, None] + self._columns
        tokens = self._tokens[active]
        block = tokens.gather(1, positions)
        if len(plan.draw_slots):
            drawn = sampled.token_ids.take(plan.draw_at)
            confidence = sampled.confidence.take(plan.draw_at)
            entropy = sampled.entropy.take(plan.draw_at)
        else:
            drawn, confidence, entropy = block, masked.float(), masked.float()
        blocks = DenoisedBlocks(
            masked=masked,
            confidence=confidence,
            entropy=entropy,
            step=step,
            masked_at_start=masked_at_start,
        )
        committed = torch.zeros_like(masked)
        for group in plan.groups:
            generation = group.generation
            own = generation.strategy.commit(blocks, generation.strategy_value)
            committed = own if group.slots is None else own.where(group.slots[:, None], committed)
        block = torch.where(committed, drawn, block)
        tokens.scatter_(1, positions, block)

        masked = self._masked[active] & ~committed
        full = ~masked.any(dim=-1) & ~verifies.bool()
        is_eos = torch.isin(block, self._eos_token_ids) & (positions >= prompt_length[:, None])
        finished = full & (is_eos.any(dim=-1) | (block_start + self._block_size >= end))
        opened = (full & ~finished)[:, None].expand_as(masked)
        if self._has_canvas:
            opened = opened & (positions + self._block_size < end[:, None])
        masked |= opened
        drawn_after = torch.zeros(2, len(block), dtype=torch.int64, device=block.device)
        if self._keeps_confidence:
            # A draft is committed by its verification.
            is_final = committed & ~verifies.bool()[:, None]
            confidence = pad(confidence.where(is_final, 0.0), (0, 1))
        for verification, result in zip(plan.verifications, verified, strict=True):
            own = verification.slots
            settled = verified_blocks(
                block[own],
                verification,
                result,
                (end - block_start)[own],
                mask_token_id=self._mask_token_id,
                eos_token_ids=self._eos_token_ids,
            )
            block[own], masked[own] = settled.tokens, settled.masked
            full[own], finished[own] = settled.is_full, settled.is_finished
            drawn_after[:, own] = torch.stack((result.num_final, result.next_token))
            if result.confidence is not None:
                confidence[own] = result.confidence.where(settled.is_new, 0.0)
            tokens.scatter_(1, positions, block)
            # Of a block that was accepted whole, the token after it is the first of the next.
            after = (positions[own, -1:] + 1).clamp(max=tokens.shape[1] - 1)
            is_next = (result.num_final == self._block_size) & ~settled.is_finished
            first = tokens[own].gather(1, after)[:, 0]
            tokens[own, after[:, 0]] = torch.where(is_next, result.next_token, first)
        self._masked[active] = masked
        columns = [block, masked]
        if self._keeps_confidence:
            columns.append(confidence.view(torch.int32))
        columns += [drawn_after.T, torch.stack((full, finished), dim=1)]
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
        masked, full = report[:, size : 2 * size] != 0, report[:, -2] != 0
        committed = self._known_masked[active] & plan.denoises[:, None] & ~(masked & ~full[:, None])
        where = (
            np.arange(self.num_active)[:, None],
            self._block_start[active, None] + np.arange(size),
        )
        step = np.where(committed, self._step[active, None], self._known_step[where])
        self._known_step[where] = step
        self._known_masked[active] = masked
        self._forwards[active] += plan.denoises
        self._step[active] += plan.denoises
        if self._config.is_autoregressive:
            self._start[active] = plan.ends
        elif not self._has_canvas:
            # Keys before the block are final now; its own become final once it is clean.
            self._start[active] = np.where(plan.denoises, self._block_start[active], plan.ends)
        if self._keeps_confidence:
            self._note_rounds(plan, report)
        self._known_tokens[where] = report[:, :size]
        if self._keeps_confidence:
            bits = np.ascontiguousarray(report[:, 2 * size : 3 * size + 1])
            confidence = bits.view(np.float32)
            self._known_confidence[where] += confidence[:, :size]
        verified = plan.verified_slots
        if len(verified):
            final, start, end = (
                report[verified, -4],
                self._block_start[verified],
                self._end[verified],
            )
            observed = size - self._masked_at_start[verified]
            self._drafted[verified] += plan.verified_drafts
            self._accepted[verified] += final - observed
            has_next = (final == size) & (start + size < end)
            after = (verified[has_next], start[has_next] + size)
            self._known_tokens[after] = report[verified[has_next], -3]
            if self._keeps_confidence:
                self._known_confidence[after] = confidence[verified[has_next], size]
        finished = report[:, -1] != 0
        opened = (full & ~finished).nonzero()[0]
        self._block_start[opened] += size
        self._step[opened] = 1
        changed = np.concatenate((opened, verified))
        self._masked_at_start[changed] = self._known_masked[changed].sum(axis=-1)
        # A draft is predicted from the token before it, whose keys are final only then.
        drafting = self._verifies[active] & plan.denoises
        before = self._block_start[active] + size - self._masked_at_start[active] - 1
        context = np.minimum(self._block_start[active], before)
        self._start[active] = np.where(drafting, context, self._start[active])
        finished_slots: list[int] = finished.nonzero()[0].tolist()
        return finished_slots

    def _note_rounds(self, plan: ForwardPlan, report: np.ndarray) -> None:
        """Keep what the forward's verifications made of drafts; before these are overwritten."""
        for slot, drafts in zip(plan.verified_slots, plan.verified_drafts, strict=True):
            first = self._settled_end(slot)
            final = self._block_start[slot] + int(report[slot, -4])
            self._rounds[slot].append(
                VerificationRound(
                    first=int(first - self._prompt_length[slot]),
                    forward=int(self._forwards[slot]),
                    draft_ids=tuple(self._known_tokens[slot, first : first + drafts].tolist()),
                    num_accepted=int(final - first),
                    next_id=int(report[slot, -3]) if final < self._end[slot] else None,
                )
            )
