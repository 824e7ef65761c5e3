"""The sequences that one rank decodes together: prompts come and go between forwards.

R: slots in use.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from megatron_dlm import platform
from megatron_dlm.models.attention import CachedAttention
from megatron_dlm.models.forward import Row, forward_hidden
from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.context import RolloutContext
from megatron_dlm.rollout.drawing import TokenDrawer
from megatron_dlm.rollout.forward_plan import ForwardPlan
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.sampling import SampledTokens
from megatron_dlm.rollout.slots import SlotTable
from megatron_dlm.rollout.verification import DraftVerifier
from megatron_dlm.rollout.work import RolloutWork
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Prompt, Trajectory


class DecodingBatch:
    """Sequences in decoding, made by `RolloutEngine.open`.

    A sequence is known by the number that it was admitted with. Its tokens depend on its prompt,
    settings, seed and sample index only, not on what else is decoded.

    Args:
        model: This rank's part of the model, in evaluation mode.
        generation: Block size and attention, and the settings of sequences without their own.
        drawer: Draws tokens.
        slots: State of the sequences, empty.
        context: Their attention, empty.
        special_tokens: Padding fills forwards of ranks without work.
        groups: Process groups.
        work: Where the sizes of forwards are noted.
    """

    def __init__(
        self,
        model: DiffusionGPTModel,
        *,
        generation: GenerationConfig,
        drawer: TokenDrawer,
        slots: SlotTable,
        context: RolloutContext,
        special_tokens: SpecialTokens,
        groups: ParallelGroups,
        work: RolloutWork,
    ) -> None:
        self._model = model
        self._generation = generation
        self._drawer = drawer
        self._slots = slots
        self._context = context
        self._pad_token_id = special_tokens.pad_token_id
        self._groups = groups
        self._work = work
        self._verifier = DraftVerifier(
            model,
            special_tokens=special_tokens,
            groups=groups,
            num_slots=slots.num_slots,
            block_size=generation.block_size or 1,
        )

    @property
    def num_active(self) -> int:
        """Sequences in decoding."""
        return self._slots.num_active

    @property
    def has_slot(self) -> bool:
        """Whether a sequence can start, if the cache has room for it."""
        return self._slots.num_active < self._slots.num_slots

    def admit(
        self,
        request: int,
        prompt: Prompt,
        generation: GenerationConfig | None = None,
        seed: int | None = None,
    ) -> bool:
        """Start a sequence with the next forward, if there is room for it.

        Args:
            request: Its number.
            prompt: What to decode.
            generation: Its own temperature, top-k, top-p and strategy; block size and attention are
                those of the batch.
            seed: Of its own draws.

        Returns:
            False if it has to wait until others have ended.
        """
        slots = self._slots
        if not self.has_slot or not self._context.admit(
            slots.num_active, prompt.known_ids, slots.length(prompt)
        ):
            return False
        try:
            slots.place(request, prompt, generation, seed)
        except BaseException:  # the slot stays unused
            self._context.release(slots.num_active)
            raise
        return True

    def any_works(self, more: bool = False) -> bool:
        """Whether a rank that shares collectives with this one has something to do; all call this.

        Args:
            more: Whether this rank has, although it decodes nothing.
        """
        nothing = torch.empty(0, 0, dtype=torch.int32, device=platform.device())
        return self._read(nothing, works=more or self.num_active > 0)[1]

    def step(self, more: bool = False) -> tuple[list[tuple[int, Trajectory]], bool]:
        """One forward: a denoising step of every sequence.

        Args:
            more: Whether prompts wait on this rank.

        Returns:
            The sequences that have ended, with their numbers, and what `any_works` would return.
        """
        slots = self._slots
        if slots.num_active == 0:
            if self._groups.lockstep is not None:
                self._idle_forward()
            return [], self.any_works(more)
        plan = slots.plan(self._context)
        report, works = self._read(self._forward(plan), works=more)
        finished = []
        # From the last slot down: a sequence that moves into a freed slot is never finished itself.
        for slot in reversed(slots.settle(plan, report)):
            finished.append((slots.request(slot), slots.trajectory(slot)))
            self._free(slot)
        return finished, works

    def leave(self, forwards: int, staying: Collection[int]) -> list[tuple[int, Trajectory]]:
        """End sequences before their time; their whole blocks are kept.

        Args:
            forwards: Denoising forwards after which a sequence ends.
            staying: Numbers of sequences that go on nevertheless.

        Returns:
            The unfinished sequences, with their numbers.
        """
        slots, left = self._slots, []
        # From the last slot down, as in `step`.
        for slot in reversed(range(slots.num_active)):
            request = slots.request(slot)
            if slots.forwards(slot) >= forwards and request not in staying:
                left.append((request, slots.unfinished(slot)))
                self._free(slot)
        return left

    def settled(self) -> Iterator[tuple[int, np.ndarray]]:
        """Number of each sequence, and the tokens [n] of its response in finished blocks."""
        for slot in range(self.num_active):
            yield self._slots.request(slot), self._slots.settled(slot)

    def block(self, request: int) -> tuple[np.ndarray, np.ndarray]:
        """The rest of a response's tokens that `settled` has not.

        Returns:
            Tokens [n] of the block in decoding, and which of them are MASK [n].
        """
        slot = self._slots.slot_of(request)
        assert slot is not None
        return self._slots.block(slot)

    def cancel(self, request: int) -> int:
        """End a sequence before its time; what it holds is free for the next one.

        Returns:
            Forwards that drew tokens for it.
        """
        slot = self._slots.slot_of(request)
        assert slot is not None
        forwards = self._slots.forwards(slot)
        self._free(slot)
        return forwards

    def _free(self, slot: int) -> None:
        self._context.release(slot)
        moved = self._slots.remove(slot)
        if moved is not None:
            self._context.move(moved, slot)
            self._verifier.move(moved, slot)

    def _read(self, report: Tensor, works: bool) -> tuple[np.ndarray, bool]:
        """Wait for a forward: the only copy from the device in a step, and so the only wait.

        Args:
            report: What `SlotTable.commit` returned, [R, columns].
            works: Whether this rank has more to do whatever the report says.

        Returns:
            The report on the host, and whether any rank that shares collectives with this one still
            has something to do.
        """
        if self._groups.lockstep is None:
            host = platform.to_host(report).numpy()
            return host, works or not host[:, -1:].all()
        going = ((report[:, -1:] == 0).any() | works).int()[None]
        dist.all_reduce(going, op=dist.ReduceOp.MAX, group=self._groups.lockstep)
        host = platform.to_host(torch.cat((report.flatten(), going))).numpy()
        return host[:-1].reshape(report.shape), bool(host[-1])

    def _idle_forward(self) -> None:
        """Take part in the others' collectives with a token that belongs to no sequence."""
        nothing = np.empty(0, dtype=np.int64)
        forward_hidden(
            self._model,
            [
                row_of_layout(
                    torch.tensor([self._pad_token_id]),
                    torch.zeros(1, dtype=torch.int64),
                    self._context.attention(nothing, nothing, nothing),
                )
            ],
        )

    def _forward(self, plan: ForwardPlan) -> Tensor:
        """One forward and one draw for all slots in use; what `SlotTable.commit` reports."""
        self._work.add(plan, self._generation.context_block_size)
        attention = self._context.attention(plan.starts, plan.ends, plan.noisy_starts)
        row = row_of_layout(self._slots.tokens(plan), plan.position_ids, attention)
        hidden = forward_hidden(self._model, [row])
        last = None if hidden is None else hidden[0]
        if len(plan.draw_rows):
            drawn = self._drawer.draw(last, plan)
        else:  # pieces of prompts, and drafts to verify
            nothing = plan.draw_rows.float()
            drawn = SampledTokens(plan.draw_rows, nothing, nothing)
        if last is not None:
            self._verifier.keep(last, plan)
        verified = self._verifier.verify(last, plan, self._slots.blocks(plan))
        return self._slots.commit(plan, drawn, verified)


def row_of_layout(
    token_ids: Tensor, position_ids: Tensor, attention: Tensor | CachedAttention
) -> Row:
    """A row with as many padding tokens as its layout has."""
    missing = attention.shape[1] - len(token_ids) if isinstance(attention, Tensor) else 0
    return Row(pad(token_ids, (0, missing)), pad(position_ids, (0, missing)), attention)
