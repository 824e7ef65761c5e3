"""The teacher of d-OPSD: the model the student started from, shown part of the finished response.

It runs once over each rollout batch. At a visited state it sees what the student saw and, at a
random share of the positions in later blocks, the tokens that the student wrote there in the end.
Its attention is bidirectional over the whole canvas, whatever the student's is. Its k most likely
tokens at the masked positions where it is most certain become the targets.

C: canvas (`rollout.visited_states`); m: states; n: targets; k: tokens of a target.
"""

import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm import object_exchange, platform
from megatron_dlm.activity import ACTIVITY
from megatron_dlm.config.schema import Config
from megatron_dlm.distillation.vocab_parallel_top_k import vocab_parallel_top_k
from megatron_dlm.models.forward import clean_row, forward_hidden
from megatron_dlm.models.lora import adapters_disabled
from megatron_dlm.models.model import StageModel, head_weight
from megatron_dlm.models.row_packing import RowPacking
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.visited_states import (
    VisitedStates,
    final_canvas,
    states_before_last_block,
)
from megatron_dlm.seeding import keyed_generator
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.types.teacher_targets import StateTargets, TopKTargets
from megatron_dlm.types.trajectory import Trajectory

TRAJECTORIES_AT_ONCE = 8
"""Whose states are packed into rows together: enough to fill rows, few enough to hold."""


class SelfTeacher:
    """Annotates right responses with targets at their visited states.

    Args:
        model: This rank's part of the student (run without its adapters) or of a frozen copy.
        config: The run's configuration.
        mask_token_id: Id of MASK.
        vocab_size: Ids from here on are padding.
        shifted: Whether the model's logits at position i predict token i + 1.
        groups: Process groups of the model.
        stop: Checked before each micro-batch for a request to stop; None: never.
    """

    head: None = None
    """None: the loss needs only the targets of this teacher."""

    def __init__(
        self,
        model: StageModel,
        config: Config,
        *,
        mask_token_id: int,
        vocab_size: int,
        shifted: bool,
        groups: ParallelGroups,
        stop: StopAgreement | None = None,
    ) -> None:
        self.model = model
        self._config = config
        self._mask_token_id = mask_token_id
        self._vocab_size = vocab_size
        self._shifted = shifted
        self._groups = groups
        self._stop = stop
        self._packing = RowPacking.of(config)

    def annotate(self, trajectories: Sequence[Trajectory]) -> None:
        """Set `targets` of each right response with more than one block; all ranks call this.

        Raises:
            StopRequested: On all ranks.
        """
        training = self.model.training
        self.model.eval()
        own_view: AbstractContextManager[None] = nullcontext()
        if self._config.teaches_itself:
            own_view = adapters_disabled(self.model)
        # A forward has the rows of training: it needs no more memory, and ranks that share experts
        # run equally many.
        size = self._config.training.micro_batch_size
        if self._packing.max_tokens is not None:
            size = TRAJECTORIES_AT_ONCE
        # Ranks that share rows share the trajectories; the targets are small and go to all of them.
        own = self._groups.part_of_shared(trajectories)
        most = -(-len(trajectories) // self._groups.cp_size)
        steps = self._packing.agreed(-(-most // size))
        with own_view, torch.no_grad(), ACTIVITY.working("trajectories", len(own)) as work:
            for start in range(0, steps * size, size):
                if self._stop is not None:
                    self._stop.check_all()  # replicas agree on their numbers of rows
                self._annotate_some(own[start : start + size])
                work.done = min(start + size, len(own))
        self.model.train(training)
        if self._groups.cp is not None:
            targets = object_exchange.all_gather([t.targets for t in own], self._groups.cp)
            for part, of_part in enumerate(targets):
                for trajectory, found in zip(
                    trajectories[part :: self._groups.cp_size], of_part, strict=True
                ):
                    trajectory.targets = found

    def _annotate_some(self, trajectories: Sequence[Trajectory]) -> None:
        """Forwards over all states of some trajectories."""
        block_size = self._config.model.block_size
        visited = [
            (trajectory, states_before_last_block(trajectory, block_size))
            for trajectory in trajectories
            if trajectory.correct
        ]
        visited = [(trajectory, states) for trajectory, states in visited if len(states)]
        views = [
            teacher_view(
                trajectory,
                states,
                fraction=self._config.self_distillation.reveal_fraction,
                mask_token_id=self._mask_token_id,
                seed=self._config.data.seed,
            )
            for trajectory, states in visited
        ]
        texts = [text for view in views for text in view]
        wanted = [
            (states.current.roll(-1, 1) if self._shifted else states.current).flatten()
            for _, states in visited
        ]
        hidden = self._hidden(texts, torch.cat([torch.empty(0, dtype=torch.bool), *wanted]))
        start = 0
        for (trajectory, states), chosen in zip(visited, wanted, strict=True):
            end = start + int(chosen.sum())
            trajectory.targets = self._targets(
                states, None if hidden is None else hidden[start:end]
            )
            start = end

    def _hidden(self, texts: Sequence[Tensor], wanted: Tensor) -> Tensor | None:
        """Hidden states of the wanted tokens [sum of C] of texts [C], on the last stage."""
        rows = [list(range(len(texts)))]  # without a budget, all states together
        if self._packing.max_tokens is not None:
            rows = self._packing.rows([len(text) for text in texts])
            rows += [[]] * (self._packing.agreed(len(rows)) - len(rows))
        ends = [0, *itertools.accumulate(len(text) for text in texts)]
        found: dict[int, Tensor] = {}
        for row in rows:
            hidden = forward_hidden(self.model, [clean_row([texts[i] for i in row], "full")])
            if hidden is None:
                continue
            found[-1] = hidden[0][:0]  # so that there is something to join without texts
            for i, part in zip(row, hidden[0].split([len(texts[i]) for i in row]), strict=True):
                found[i] = part[wanted[ends[i] : ends[i + 1]].to(part.device)]
        return torch.cat([found[i] for i in sorted(found)]) if found else None

    def _targets(self, states: VisitedStates, hidden: Tensor | None) -> StateTargets:
        """The targets of one trajectory, from the hidden states that predict its masked tokens."""
        options = self._config.self_distillation
        counts = states.current.sum(1).clamp(max=options.positions_per_state)
        state = torch.repeat_interleave(counts)
        k = options.teacher_top_k
        # float64 carries ids and probabilities exactly in one message.
        packed = torch.empty(len(state), 1 + 2 * k, dtype=torch.float64, device=platform.device())
        if hidden is not None:
            position, top_k = self._surest(states, hidden)
            packed[:, 0] = position
            packed[:, 1 : 1 + k] = top_k.token_ids
            packed[:, 1 + k :] = top_k.log_probs
        if self._groups.pp is not None:
            dist.broadcast(packed, src=self._groups.pp_last_rank, group=self._groups.pp)
        packed = packed.cpu()
        return StateTargets(
            state=state,
            position=packed[:, 0].long(),
            token_ids=packed[:, 1 : 1 + k].int(),
            log_probs=packed[:, 1 + k :].float(),
        )

    def _surest(self, states: VisitedStates, hidden: Tensor) -> tuple[Tensor, TopKTargets]:
        """The highest-ranked positions [n] of each state, ascending, and their targets."""
        options = self._config.self_distillation
        state, position = states.current.nonzero(as_tuple=True)
        top_k, largest_logit = vocab_parallel_top_k(
            hidden,
            head_weight(self.model),
            options.teacher_top_k,
            self._vocab_size,
            self._groups.tp,
            self._config.distillation.divergence_chunk_size,
        )
        confidence = torch.full(states.current.shape, -torch.inf)
        by_logit = options.position_ranking == "logit"
        rank_by = largest_logit if by_logit else top_k.log_probs[:, 0]
        confidence[state, position] = rank_by.cpu()
        # A stable sort: of equals, the earlier position comes first.
        ranked = confidence.sort(dim=1, descending=True, stable=True).indices
        chosen = torch.zeros_like(states.current)
        chosen.scatter_(1, ranked[:, : options.positions_per_state], True)
        chosen &= states.current
        kept = chosen[state, position]
        return position[kept].to(hidden.device), top_k[kept.to(hidden.device)]


def teacher_view(
    trajectory: Trajectory,
    states: VisitedStates,
    *,
    fraction: float,
    mask_token_id: int,
    seed: int,
) -> Tensor:
    """Token ids that the teacher sees at each state, [m, C] int64.

    Args:
        trajectory: The finished response.
        states: Its visited states.
        fraction: Share of the written positions of later blocks that are revealed, rounded up.
        mask_token_id: Id of MASK.
        seed: With the sample index, decides which positions.
    """
    canvas = final_canvas(trajectory, mask_token_id)
    masked = states.masked
    generator = keyed_generator(seed, trajectory.sample_index, "reveal")
    for state in range(len(states)):
        candidates = (states.later[state] & states.written).nonzero()[:, 0]
        order = torch.randperm(len(candidates), generator=generator)
        masked[state, candidates[order[: math.ceil(fraction * len(candidates))]]] = False
    return canvas.expand_as(masked).masked_fill(masked, mask_token_id)
