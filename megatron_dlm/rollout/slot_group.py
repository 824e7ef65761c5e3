"""Sequences that take their steps together, while other groups are in other stages.

R: slots in use.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from torch import Tensor

from megatron_dlm.models.model import StageModel
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.context import RolloutContext
from megatron_dlm.rollout.decisions import Decisions
from megatron_dlm.rollout.drawing import TokenDrawer
from megatron_dlm.rollout.forward_plan import ForwardPlan
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.slots import SlotTable
from megatron_dlm.rollout.token_shares import TokenShares
from megatron_dlm.rollout.verification import DraftVerifier
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Prompt, Trajectory


class SlotGroup:
    """Slots with their attention and their drafts.

    Between `launched` and `reported` nothing of it may change.

    Args:
        model: This rank's part of the model.
        drawer: Draws tokens.
        slots: State of the sequences, empty.
        context: Their attention, empty.
        special_tokens: See `DraftVerifier`.
        groups: Process groups.
        block_size: Tokens of a block; None where a response is one.

    Attributes:
        in_flight: What the last stage decides about the forward that is under way; None: none is.
    """

    def __init__(
        self,
        model: StageModel,
        *,
        drawer: TokenDrawer,
        slots: SlotTable,
        context: RolloutContext,
        special_tokens: SpecialTokens,
        groups: ParallelGroups,
        block_size: int | None,
    ) -> None:
        self.in_flight: Decisions | None = None
        self.slots = slots
        self.context = context
        self._drawer = drawer
        self._groups = groups
        self._shares = TokenShares.of(groups)
        self._verifier = DraftVerifier(
            model,
            special_tokens=special_tokens,
            groups=groups,
            num_slots=slots.num_slots,
            block_size=block_size or 1,
        )

    @property
    def has_slot(self) -> bool:
        """Whether a sequence can start, if the cache has room for it."""
        return self.slots.num_active < self.slots.num_slots

    def admit(
        self, request: int, prompt: Prompt, generation: GenerationConfig | None, seed: int | None
    ) -> bool:
        """See `DecodingBatch.admit`."""
        slots = self.slots
        if not self.has_slot or not self.context.admit(
            slots.num_active, prompt.known_ids, slots.length(prompt)
        ):
            return False
        try:
            slots.place(request, prompt, generation, seed)
        except BaseException:  # the slot stays unused
            self.context.release(slots.num_active)
            raise
        return True

    def launched(self, plan: ForwardPlan, hidden: Tensor | None, drawn_from: Tensor | None) -> None:
        """A forward has left this stage.

        Args:
            plan: Its plan.
            hidden: [S, h] on the last stage, read to verify drafts only; None on the others.
            drawn_from: [n, h] on the last stage, hidden states of the draws.
        """
        own = None
        if hidden is not None and drawn_from is not None:
            draws = self._drawer.draw(drawn_from, plan)
            self._verifier.keep(drawn_from, plan)
            verified = self._verifier.verify(hidden, plan, self.slots.blocks(plan))
            own = draws, verified if self._shares is None else self._shares.agree(verified)
        self.in_flight = Decisions.shared(plan, own, self._groups)

    def report(self) -> Tensor:
        """Wait for what was decided, and take it over on the device; see `SlotTable.commit`."""
        assert self.in_flight is not None
        self.in_flight.wait()
        return self.slots.commit(self.in_flight.plan, self.in_flight.draws, self.in_flight.verified)

    def settle(self, report: np.ndarray) -> list[tuple[int, Trajectory]]:
        """Take over on the host what `report` returned.

        Returns:
            The sequences that have ended, with their numbers.
        """
        assert self.in_flight is not None
        plan, self.in_flight = self.in_flight.plan, None
        finished = []
        # From the last slot down: a sequence that moves into a freed slot is never finished itself.
        for slot in reversed(self.slots.settle(plan, report)):
            finished.append((self.slots.request(slot), self.slots.trajectory(slot)))
            self.free(slot)
        return finished

    def leave(self, forwards: int, staying: Collection[int]) -> list[tuple[int, Trajectory]]:
        """See `DecodingBatch.leave`."""
        slots, left = self.slots, []
        # From the last slot down, as in `settle`.
        for slot in reversed(range(slots.num_active)):
            request = slots.request(slot)
            if slots.forwards(slot) >= forwards and request not in staying:
                left.append((request, slots.unfinished(slot)))
                self.free(slot)
        return left

    def free(self, slot: int) -> None:
        """End the sequence of a slot; the last one moves into its place."""
        self.context.keep(slot, self.slots.final_ids(slot))
        self.context.release(slot)
        moved = self.slots.remove(slot)
        if moved is not None:
            self.context.move(moved, slot)
            self._verifier.move(moved, slot)
