"""Complete the stores of a run with what a teacher elsewhere says: its responses, its targets.

Of each replica of the student one rank asks and writes; the store is that of a teacher in memory,
so a run may change the teacher's place. A shard is written when all of it has come.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

import torch

from megatron_dlm.config import Config
from megatron_dlm.data.response_store import ResponseStore
from megatron_dlm.data.top_k_store import TopKStore
from megatron_dlm.models.row_packing import RowPacking
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.teacher.client import Asked, TeacherClient
from megatron_dlm.teacher.shard_rounds import PROMPTS_PER_SHARD, missing_prompts, shards_of
from megatron_dlm.teacher.waiting import wait_for
from megatron_dlm.teacher.wire import Drawing, TeacherPrompt, TeacherRow, TeacherText
from megatron_dlm.terminal import say
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.teacher_targets import TeacherTargets, TopKTargets
from megatron_dlm.types.trajectory import Prompt, Trajectory

T = TypeVar("T")


def ask_for_responses(
    config: Config,
    store: ResponseStore,
    prompts: Sequence[Prompt],
    wanted: Iterable[int],
    client: TeacherClient,
    special_tokens: SpecialTokens,
    groups: ParallelGroups,
    stop: StopAgreement | None = None,
) -> None:
    """Complete a store of responses, as `responses.generate_missing` does; all ranks call this.

    Args:
        config: How responses are drawn, and the longest one.
        store: Responses that exist.
        prompts: All prompts of the file.
        wanted: Indices of those whose responses are needed, ascending.
        client: Reaches the teacher.
        special_tokens: Of the tokenizer.
        groups: Process groups of the student.
        stop: Looked at while the teacher answers; stored shards are kept.

    Raises:
        StopRequested: On all ranks.
        UserError: On all ranks: the teacher does not answer, or what the store holds is damaged.
    """
    missing = missing_prompts(store, wanted)
    if not missing:
        return
    shards = _own(missing, groups)
    rollout, limit = config.rollout, config.rollout.max_response_length
    drawing = Drawing(
        rollout.temperature,
        rollout.top_k,
        rollout.top_p,
        config.data.seed,
        special_tokens.eos_token_ids,
        special_tokens.pad_token_id,
        special_tokens.mask_token_id,
        special_tokens.vocab_size,
    )
    asks = [
        TeacherPrompt(prompt.sample_index, prompt.token_ids, prompt.response_limit(limit))
        for shard in shards
        for prompt in (prompts[index] for index in shard)
    ]
    asked = client.begin_responses(asks, drawing, rollout.max_running_requests)
    parts = _Parts(asked, shards, [len(shard) for shard in shards], store.write)
    wait_for(asked, stop, parts.keeper("teacher responses", len(missing), groups))


def ask_for_targets(
    config: Config,
    store: TopKStore,
    examples: Sequence[Trajectory],
    wanted: Iterable[int],
    client: TeacherClient,
    groups: ParallelGroups,
    stop: StopAgreement | None = None,
) -> None:
    """Complete a store of targets, as `top_k.compute_missing` does; all ranks call this.

    Args:
        config: k (`divergence_top_k`), and how texts are laid into rows.
        store: Targets that exist.
        examples: All examples; the wanted ones have a response.
        wanted: Indices of those whose targets are needed, ascending.
        client: Reaches the teacher.
        groups: Process groups of the student.
        stop: Looked at while the teacher answers; stored shards are kept.

    Raises:
        StopRequested: On all ranks.
        UserError: On all ranks: the teacher does not answer, or what the store holds is damaged.
    """
    missing = missing_prompts(store, wanted)
    if not missing:
        return
    shards, packing = _own(missing, groups), RowPacking.of(config)
    if packing.max_tokens is not None:
        packing = RowPacking()
    of_shards = []
    for shard in shards:
        texts = [TeacherText.of(examples[index]) for index in shard]
        rows = packing.rows([len(text.token_ids) for text in texts])
        of_shards.append([TeacherRow(tuple(texts[index] for index in row)) for row in rows])

    def write(shard: Sequence[int], targets: Sequence[TeacherTargets]) -> None:
        whole = TeacherTargets.cat(targets)
        assert isinstance(whole, TopKTargets)
        store.write(shard, whole)

    asked = client.begin(
        [row for rows in of_shards for row in rows], config.distillation.divergence_top_k
    )
    parts = _Parts(asked, shards, [len(rows) for rows in of_shards], write)
    wait_for(asked, stop, parts.keeper("teacher top-k", len(missing), groups))


def _own(missing: list[int], groups: ParallelGroups) -> list[list[int]]:
    """The shards that this rank asks for."""
    if not groups.is_first_of_replica:
        return []
    shards = shards_of(missing, groups.num_replicas, PROMPTS_PER_SHARD)
    return [shard for shard in shards[groups.replica :: groups.num_replicas] if shard]


class _Parts(Generic[T]):
    """Shards that come piece by piece, in any order.

    Args:
        asked: Their pieces, end to end.
        shards: Prompts of each.
        sizes: Pieces of each.
        write: Called with a shard that is complete, and its pieces in order.
    """

    def __init__(
        self,
        asked: Asked[T],
        shards: Sequence[Sequence[int]],
        sizes: Sequence[int],
        write: Callable[[Sequence[int], Sequence[T]], None],
    ) -> None:
        self._asked, self._shards, self._write = asked, shards, write
        self._shard_of = [shard for shard, size in enumerate(sizes) for _ in range(size)]
        self._sizes = sizes
        self._come: dict[int, dict[int, T]] = {shard: {} for shard in range(len(shards))}

    def keeper(self, what: str, total: int, groups: ParallelGroups) -> Callable[[], None]:
        """What writes shards that have come, and says how far it is on the first rank."""
        done = 0

        def keep() -> None:
            nonlocal done
            for piece, found in self._asked.taken().items():
                shard = self._shard_of[piece]
                come = self._come[shard]
                come[piece] = found
                if len(come) == self._sizes[shard]:
                    self._write(self._shards[shard], [come[piece] for piece in sorted(come)])
                    del self._come[shard]
                    done += len(self._shards[shard])
                    if torch.distributed.get_rank() == 0:  # the others are about as far
                        say(f"{what}: {min(done * groups.num_replicas, total)}/{total} prompts")

        return keep
