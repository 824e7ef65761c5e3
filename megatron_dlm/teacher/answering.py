"""Targets of texts and responses to prompts, by a teacher whose ranks run in step.

Ranks in step hold one replica of the teacher, or several that share experts. All of them get the
same texts or prompts; each replica takes its share, and the first rank gets all results.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm import object_exchange, platform
from megatron_dlm.activity import ACTIVITY
from megatron_dlm.config import Config
from megatron_dlm.distillation.vocab_parallel_top_k import vocab_parallel_top_k
from megatron_dlm.errors import UserError
from megatron_dlm.models.forward import clean_row, forward_hidden
from megatron_dlm.models.model import StageModel, head_weight
from megatron_dlm.models.row_packing import RowPacking
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.context import MAX_MEMORY_SHARE
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.teacher.frozen import rows_in_flight
from megatron_dlm.teacher.wire import Drawing, TeacherPrompt, TeacherRow, TeacherText
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.teacher_targets import HiddenTargets, TeacherTargets
from megatron_dlm.types.trajectory import Prompt

T = TypeVar("T")

MARGIN = 1.1
"""What a forward may take beyond `ForwardBytes`."""

ForwardBytes = Callable[[int, int], float]
"""Memory that a forward takes, by the tokens of its longest row and those of all its rows."""


class TextTeacher:
    """Computes targets and responses; every method is called by all ranks in step.

    Args:
        model: This rank's part, frozen and in evaluation mode.
        config: That the model was built by: layout, rows, chunks of the output layer,
            sequences decoded at once.
        groups: Process groups of the model.
        in_step: The ranks in step, over gloo; None where this rank is alone.
        forward_bytes: Of ranks in step, which look for that memory before a forward: one that finds
            none in the middle of it would leave the others waiting.
    """

    def __init__(
        self,
        model: StageModel,
        config: Config,
        groups: ParallelGroups,
        in_step: dist.ProcessGroup | None,
        forward_bytes: ForwardBytes | None = None,
    ) -> None:
        self._forward_bytes = forward_bytes
        self._model, self._groups, self.in_step = model, groups, in_step
        self._config = config
        self._packing = RowPacking.of(config)
        self._chunk = config.distillation.divergence_chunk_size
        self._rows_at_once = rows_in_flight(config)
        replicas = [groups.replica]
        if in_step is not None:
            replicas = [0] * in_step.size()
            dist.all_gather_object(replicas, groups.replica, group=in_step)
        of_set = sorted(set(replicas))
        self._replica, self._replicas = of_set.index(groups.replica), len(of_set)

    @property
    def is_first(self) -> bool:
        """Whether this is the first of the ranks in step, which has the results."""
        return self.in_step is None or self.in_step.rank() == 0

    def targets(self, rows: Sequence[TeacherRow], k: int) -> list[TeacherTargets]:
        """The targets of rows of texts, on the CPU; empty on all ranks but the first.

        Texts that came alone are packed as the configuration says; others stay in their row.

        Args:
            rows: The same on all ranks.
            k: Tokens of a distribution, fewer than there are; 0: hidden states.

        Raises:
            UserError: One of several ranks has no memory for a forward; on all of them.
        """
        alone = [index for index, row in enumerate(rows) if len(row.texts) == 1]
        packed = self._packing.rows([rows[index].num_tokens for index in alone])
        together = [[alone[i] for i in row] for row in packed if row]
        together += [[index] for index, row in enumerate(rows) if len(row.texts) > 1]
        rounds = -(-len(together) // self._replicas)
        own = together[self._replica :: self._replicas]
        own += [[]] * (rounds - len(own))  # ranks that share experts run equally many rows
        self._check_room_for_rows([sum(rows[i].num_tokens for i in row) for row in together])
        found: dict[int, TeacherTargets] = {}
        for start in range(0, rounds, self._rows_at_once):
            chunk = own[start : start + self._rows_at_once]
            texts = [[text for i in row for text in rows[i].texts] for row in chunk]
            clean = [clean_row([text.token_ids for text in row], "causal") for row in texts]
            hidden_rows = forward_hidden(self._model, clean)
            for row, of_row, hidden in zip(
                chunk, texts, hidden_rows or [], strict=hidden_rows is not None
            ):
                if row:
                    counts = [len(rows[i]) for i in row]
                    targets = self._of_row(of_row, counts, hidden, k)
                    found |= dict(zip(row, targets, strict=True))
            ACTIVITY.step()
        return self._gathered(found, len(rows))

    def responses(self, prompts: Sequence[TeacherPrompt], drawing: Drawing) -> list[list[int]]:
        """Responses to prompts, drawn from left to right; empty on all ranks but the first.

        They are those of the same weights in a run (`responses.generate_missing`).

        Args:
            prompts: The same on all ranks.
            drawing: How they are drawn.

        Raises:
            UserError: The longest of them do not fit into the KV cache, or one of several ranks has
                no memory for a forward; on all of them.
        """
        rollout, eos = self._config.rollout, drawing.eos_token_ids
        of_replica = prompts[: -(-len(prompts) // self._replicas)]
        read = min(sum(len(p.token_ids) for p in prompts), rollout.chunked_prefill_size)
        drawn = min(len(of_replica), rollout.max_running_requests)
        # The KV cache leaves at least this share of the memory.
        self._check_room(read + drawn, read + drawn, 1.0 - MAX_MEMORY_SHARE)
        engine = RolloutEngine(
            self._model,
            generation=GenerationConfig.autoregressive(
                temperature=drawing.temperature,
                top_k=drawing.top_k,
                top_p=drawing.top_p,
                max_running_requests=rollout.max_running_requests,
                max_total_tokens=rollout.max_total_tokens,
                chunked_prefill_size=rollout.chunked_prefill_size,
                decoding_groups=rollout.decoding_groups,
                rollout_graphs=rollout.rollout_graphs,
            ),
            special_tokens=SpecialTokens(
                eos[0],
                drawing.pad_token_id,
                drawing.mask_token_id,
                eos,
                vocab_size=drawing.vocab_size,
            ),
            seed=drawing.seed,
            groups=self._groups,
        )
        own = range(self._replica, len(prompts), self._replicas)
        trajectories = engine.generate(
            [
                Prompt(
                    prompts[index].sample_index,
                    prompts[index].token_ids,
                    max_response_length=prompts[index].max_response_length,
                )
                for index in own
            ],
            max(prompt.max_response_length for prompt in prompts),
        )
        found = dict(zip(own, (t.response_ids.tolist() for t in trajectories), strict=True))
        return self._gathered(found if self._groups.is_first_of_replica else {}, len(prompts))

    def _check_room_for_rows(self, lengths: Sequence[int]) -> None:
        """`_check_room` for the forward with most tokens of those that `targets` makes."""
        at_once = self._rows_at_once * self._replicas
        chunks = [lengths[first : first + at_once] for first in range(0, len(lengths), at_once)]
        most = max(sum(sorted(chunk)[-self._rows_at_once :]) for chunk in chunks)
        self._check_room(max(lengths), most)

    def _check_room(self, longest: int, tokens: int, share: float = 1.0) -> None:
        """Refuse a forward that a rank in step has no memory for, on all of them.

        Args:
            longest: Tokens of its longest row.
            tokens: Of all its rows.
            share: Of the memory that is free, what the forward may take.
        """
        if self.in_step is None or self._forward_bytes is None:
            return
        needed = MARGIN * self._forward_bytes(longest, tokens)
        has_room = torch.tensor(platform.has_room(int(needed / share)), dtype=torch.int32)
        dist.all_reduce(has_room, dist.ReduceOp.MIN, self.in_step)
        if not has_room:
            platform.release_memory()
            raise UserError(
                f"a rank of the teacher has no memory for a forward of {tokens} tokens, about "
                f"{needed / 1e9:.2g} GB; send shorter texts, or start the teacher on more ranks"
            )

    def _of_row(
        self, texts: Sequence[TeacherText], counts: Sequence[int], hidden: Tensor, k: int
    ) -> list[TeacherTargets]:
        """The targets of the texts of a row of hidden states [S, h], in parts of so many."""
        wanted, start = [], 0
        for text in texts:
            wanted.append(hidden[start + text.first : start + len(text.token_ids)])
            start += len(text.token_ids)
        targets: TeacherTargets = HiddenTargets(torch.cat(wanted))
        if k:
            targets, _ = vocab_parallel_top_k(
                torch.cat(wanted),
                head_weight(self._model),
                k,
                self._model.num_tokens,
                self._groups.tp,
                self._chunk,
            )
        targets = targets.to(torch.device("cpu"))
        return [targets[slice(*ends)] for ends in pairwise(accumulate(counts, initial=0))]

    def _gathered(self, found: dict[int, T], number: int) -> list[T]:
        """All results of the ranks in step, in order, on the first of them."""
        speaks = self._groups.tp is None or self._groups.tp.rank() == 0
        parts = self._on_first(found if speaks else {})
        if not self.is_first:
            return []
        whole = {index: result for part in parts for index, result in part.items()}
        return [whole[index] for index in range(number)]

    def head(self) -> Tensor | None:
        """The whole output layer [V, h], on the CPU of the first rank; None on the others."""
        own = None
        if self._replica == 0 and self._model.post_process:
            own = head_weight(self._model).detach().cpu()
        shards = [shard for shard in self._on_first(own) if shard is not None]  # by their ranks
        return torch.cat(shards)[: self._model.num_tokens] if self.is_first else None

    def _on_first(self, own: T) -> list[T]:
        """What all ranks in step have, on the first of them; empty on the others."""
        return [own] if self.in_step is None else object_exchange.gather(own, self.in_step)
