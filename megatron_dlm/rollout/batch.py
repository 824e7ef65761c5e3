"""The sequences that one rank decodes together: prompts come and go between forwards.

Where the layers are spread over pipeline stages, the sequences are spread over groups, and a stage
runs the forward of the next group while later stages still have that of the one before. A group's
next forward needs what the last stage has drawn from its last one. So with as many groups as stages
no stage waits for another, if all take equally long; more groups make up for some of what they do
not. All stages take the same turns in the same order, from what they all know: who starts, ends or
moves never has to be told.

Where a stage has several model chunks (virtual stages), as many groups as stages form a round: each
goes through the first chunks of all stages, then each through the second ones, and so on.

R: slots in use.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from megatron_dlm import platform
from megatron_dlm.models.attention import CachedAttention
from megatron_dlm.models.forward import Row, forward_row
from megatron_dlm.models.model import StageModel, chunks_of
from megatron_dlm.models.stage import PaddedRow, Stage
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout import kv_cache
from megatron_dlm.rollout.forward_plan import ForwardPlan
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.recorded_forwards import ForwardRecorder
from megatron_dlm.rollout.slot_group import SlotGroup
from megatron_dlm.rollout.token_shares import TokenShares
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
        slot_groups: The groups of sequences, empty; as many on all ranks.
        special_tokens: Padding fills forwards of ranks without work.
        groups: Process groups.
        work: Where the sizes of forwards are noted.
        recorder: Runs forwards from recordings; None: there are none.
    """

    def __init__(
        self,
        model: StageModel,
        *,
        generation: GenerationConfig,
        slot_groups: Sequence[SlotGroup],
        special_tokens: SpecialTokens,
        groups: ParallelGroups,
        work: RolloutWork,
        recorder: ForwardRecorder | None = None,
    ) -> None:
        self._generation = generation
        self._model, self._recorder = model, recorder
        if recorder is not None:
            recorder.check(model)
        self._slot_groups = slot_groups
        self._turn = 0
        self._pad_token_id = special_tokens.pad_token_id
        self._groups = groups
        self._shares = TokenShares.of(groups)
        # Where kernels see few shapes or ranks have parts of a forward, all hidden states are read.
        static = kv_cache.has_static_shapes(platform.device())
        self._reads_draws = not static and self._shares is None
        self._leaves_out = chunks_of(model)[-1].reads_early
        self._work = work
        self._stage = Stage(
            model, groups, rows_in_flight=len(slot_groups), forward=recorder or forward_row
        )
        self._stages = 1 if groups.pp is None else groups.pp.size()
        self._round: list[tuple[PaddedRow, SlotGroup | None, ForwardPlan | None]] = []

    @property
    def num_active(self) -> int:
        """Sequences in decoding."""
        return sum(group.slots.num_active for group in self._slot_groups)

    @property
    def _next(self) -> SlotGroup:
        """The group whose forward is the next one."""
        return self._slot_groups[self._turn]

    @property
    def has_slot(self) -> bool:
        """Whether a sequence can start with the next forward, if the cache has room for it."""
        return self._next.has_slot

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
        return self._next.admit(request, prompt, generation, seed)

    def any_works(self, more: bool = False) -> bool:
        """Whether a rank that shares collectives with this one has something to do; all call this.

        Args:
            more: Whether this rank has, although it decodes nothing.
        """
        nothing = torch.empty(0, 0, dtype=torch.int32, device=platform.device())
        return self._read(nothing, works=more or self.num_active > 0)[1]

    def step(self, more: bool = False) -> tuple[list[tuple[int, Trajectory]], bool]:
        """One forward, a denoising step of a group; then the results of the group that is next.

        With one group, these are those of this forward.

        Args:
            more: Whether prompts wait on this rank.

        Returns:
            The sequences that have ended, with their numbers, and what `any_works` would return.
        """
        group = self._next
        if group.slots.num_active:
            plan = group.slots.plan(group.context)
            self._forward(plan)
        elif self._groups.lockstep is not None:
            self._idle_forward()
        self._turn = (self._turn + 1) % len(self._slot_groups)
        if self._turn % self._stages == 0:
            self._end_round()
        group = self._next
        if group.in_flight is None:
            return [], self.any_works(more)
        others = self.num_active > group.slots.num_active
        report, works = self._read(group.report(), works=more or others)
        return group.settle(report), works

    def drain(self) -> None:
        """Wait for all messages that are under way; nothing is decoded any more."""
        self._end_round()
        for group in self._slot_groups:
            if group.in_flight is not None:
                group.in_flight.wait()
        self._stage.settle()

    def leave(self, forwards: int, staying: Collection[int]) -> list[tuple[int, Trajectory]]:
        """End sequences of the next forward before their time; their whole blocks are kept.

        Args:
            forwards: Denoising forwards after which a sequence ends.
            staying: Numbers of sequences that go on nevertheless.

        Returns:
            The unfinished sequences, with their numbers.
        """
        return self._next.leave(forwards, staying)

    def settled(self) -> Iterator[tuple[int, np.ndarray]]:
        """Number of each sequence, and the tokens [n] of its response in finished blocks."""
        for group in self._slot_groups:
            for slot in range(group.slots.num_active):
                yield group.slots.request(slot), group.slots.settled(slot)

    def _place_of(self, request: int) -> tuple[SlotGroup, int]:
        """Where a sequence in decoding is."""
        for group in self._slot_groups:
            slot = group.slots.slot_of(request)
            if slot is not None:
                return group, slot
        raise KeyError(f"no sequence {request} in decoding")

    def block(self, request: int) -> tuple[np.ndarray, np.ndarray]:
        """The rest of a response's tokens that `settled` has not.

        Returns:
            Tokens [n] of the block in decoding, and which of them are MASK [n].
        """
        group, slot = self._place_of(request)
        return group.slots.block(slot)

    def forget(self) -> None:
        """After the weights were replaced, while nothing is in decoding: no old key is read again.

        Raises:
            ValueError: A sequence is in decoding.
        """
        if self.num_active:
            raise ValueError(f"{self.num_active} sequences are in decoding")
        for group in self._slot_groups:
            group.context.forget()
        if self._recorder is not None:
            self._recorder.check(self._model)

    def cancel(self, request: int) -> int:
        """End a sequence before its time; what it holds is free for the next one.

        Returns:
            Forwards that drew tokens for it.

        Raises:
            ValueError: Its forward is under way, as may be with several groups.
        """
        group, slot = self._place_of(request)
        if group.in_flight is not None:
            raise ValueError(f"sequence {request} is in a forward; cancel it in its group's turn")
        forwards = group.slots.forwards(slot)
        group.free(slot)
        return forwards

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
        row = row_of_layout(
            torch.tensor([self._pad_token_id]),
            torch.zeros(1, dtype=torch.int64),
            self._next.context.attention(nothing, nothing, nothing),
        )
        self._begin(row, None, None)

    def _forward(self, plan: ForwardPlan) -> None:
        """One forward of all slots of the next group, and its draws; see `_begin`."""
        group = self._next
        read = plan.read if self._reads_draws else None
        leaves_out = self._leaves_out and read is not None and len(read) > 0
        self._work.add(
            plan,
            self._generation.context_block_size,
            self._turn,
            read=len(plan.draw_rows) if leaves_out else None,
        )
        attention = group.context.attention(plan.starts, plan.ends, plan.noisy_starts)
        tokens, positions = group.slots.tokens(plan), plan.position_ids
        if self._shares is not None:
            tokens, positions = self._shares.own(tokens), self._shares.own(positions)
        row = row_of_layout(tokens, positions, attention)
        self._begin(replace(row, read=read), group, plan)

    def _begin(self, row: Row, group: SlotGroup | None, plan: ForwardPlan | None) -> None:
        """Run a row through the first model chunk; the others wait for the end of the round.

        Args:
            row: The row.
            group: Whose it is; None: nobody's.
            plan: Of its forward.
        """
        padded = self._stage.prepared(row)
        self._round.append((padded, group, plan))
        self._run(padded, group, plan, 0)

    def _end_round(self) -> None:
        """Run the rows of a round through the other model chunks, one chunk after the other.

        A round has a row for each stage: when the first stage has run the last row through a chunk,
        the first row comes from the last stage, for the next chunk.
        """
        for chunk in range(1, self._stage.num_chunks):
            for padded, group, plan in self._round:
                self._run(padded, group, plan, chunk)
        self._round.clear()

    def _run(
        self, row: PaddedRow, group: SlotGroup | None, plan: ForwardPlan | None, chunk: int
    ) -> None:
        hidden = self._stage.run(row, chunk)
        if hidden is not None and plan is not None and self._shares is not None:
            hidden = self._shares.gather(hidden, len(plan.token_slots))
        if group is not None and plan is not None and chunk == self._stage.num_chunks - 1:
            drawn_from = hidden
            if hidden is not None and row.row.read is None:
                drawn_from = hidden.index_select(0, plan.draw_rows)
            group.launched(plan, hidden, drawn_from)


def row_of_layout(
    token_ids: Tensor, position_ids: Tensor, attention: Tensor | CachedAttention
) -> Row:
    """A row with as many padding tokens as its layout has."""
    missing = attention.shape[1] - len(token_ids) if isinstance(attention, Tensor) else 0
    return Row(pad(token_ids, (0, missing)), pad(position_ids, (0, missing)), attention)
