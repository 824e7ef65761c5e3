"""The teacher's most likely tokens at every token of its stored responses, computed once.

Training then needs neither the teacher nor its hidden states: a distribution is stored as k ids and
k + 1 numbers.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from megatron_dlm.config import Config
from megatron_dlm.data.top_k_store import TopKStore
from megatron_dlm.distillation.vocab_parallel_top_k import vocab_parallel_top_k
from megatron_dlm.models.model import StageModel
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.teacher.frozen import FrozenTeacher, frozen_teacher
from megatron_dlm.teacher.shard_rounds import (
    PROMPTS_PER_SHARD,
    ended_by_all,
    missing_prompts,
    rounds,
)
from megatron_dlm.types.teacher_targets import HiddenTargets, TeacherTargets, TopKTargets
from megatron_dlm.types.trajectory import Trajectory


def compute_missing(
    config: Config,
    store: TopKStore,
    examples: Sequence[Trajectory],
    wanted: Iterable[int],
    model: Callable[[], StageModel],
    vocab_size: int,
    groups: ParallelGroups,
    prompts_per_shard: int = PROMPTS_PER_SHARD,
    stop: StopAgreement | None = None,
) -> None:
    """Complete a store of targets; all ranks call this.

    Args:
        config: k (`divergence_top_k`) and batch sizes.
        store: Targets that exist.
        examples: All examples; the wanted ones have a response.
        wanted: Indices of those whose targets are needed, ascending.
        model: Loads this rank's part of the teacher; called only if a shard is missing.
        vocab_size: Ids from here on are padding.
        groups: Process groups of the teacher.
        prompts_per_shard: Most prompts of a shard.
        stop: Checked before every forward for a request to stop; stored shards are kept.

    Raises:
        StopRequested: On all ranks.
        UserError: What the store holds is damaged.
    """
    missing = missing_prompts(store, wanted)
    if not missing:
        return
    teacher = frozen_teacher(model(), config, stop)
    at_once = max(1, config.training.global_batch_size // groups.num_replicas)
    writes = groups.tp is None or groups.tp.rank() == 0
    with ended_by_all():
        for shard, most in rounds(missing, "teacher top-k", groups, prompts_per_shard):
            # Ranks that share experts run equal numbers of rows: a smaller shard is filled up.
            indices = [*shard, *[missing[0]] * (most - len(shard))]
            parts = []
            for start in range(0, most, at_once):
                trajectories = [examples[index] for index in indices[start : start + at_once]]
                own = max(0, len(shard) - start)
                targets = _targets(config, teacher, trajectories, own, vocab_size, groups)
                if targets is not None:
                    parts.append(targets)
            if parts and writes and shard:
                store.write(shard, TeacherTargets.cat(parts))


def _targets(
    config: Config,
    teacher: FrozenTeacher,
    trajectories: Sequence[Trajectory],
    count: int,
    vocab_size: int,
    groups: ParallelGroups,
) -> TopKTargets | None:
    """Targets of the first `count` trajectories on the CPU; on the last pipeline stage only."""
    teacher.annotate(trajectories)
    if teacher.head is None:
        return None
    hidden = [t.targets for t in trajectories[:count] if isinstance(t.targets, HiddenTargets)]
    if not hidden:
        return None
    targets, _ = vocab_parallel_top_k(
        TeacherTargets.cat(hidden).hidden,
        teacher.head,
        config.distillation.divergence_top_k,
        vocab_size,
        groups.tp,
        config.distillation.divergence_chunk_size,
    )
    return targets.to(torch.device("cpu"))
