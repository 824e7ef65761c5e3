"""The AR teacher's responses to the prompts of a run, generated once with a KV cache.

Draws are keyed by the prompt's place in the file, so the responses depend neither on the layout nor
on interruptions.
"""

from collections.abc import Callable, Iterable, Sequence

from megatron_dlm.config import Config
from megatron_dlm.data.response_store import ResponseStore
from megatron_dlm.models.model import StageModel
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.teacher.shard_rounds import (
    PROMPTS_PER_SHARD,
    ended_by_all,
    missing_prompts,
    rounds,
)
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Prompt


def generate_missing(
    config: Config,
    store: ResponseStore,
    prompts: Sequence[Prompt],
    wanted: Iterable[int],
    teacher: Callable[[], StageModel],
    special_tokens: SpecialTokens,
    groups: ParallelGroups,
    prompts_per_shard: int = PROMPTS_PER_SHARD,
    stop: StopAgreement | None = None,
) -> None:
    """Complete a store of responses; all ranks call this.

    Args:
        config: Decoding settings and the longest response.
        store: Responses that exist.
        prompts: All prompts of the file.
        wanted: Indices of those whose responses are needed, ascending.
        teacher: Loads this rank's part of the teacher; called only if a response is missing.
        special_tokens: Of the tokenizer.
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
    engine = RolloutEngine(
        teacher(),
        generation=GenerationConfig.autoregressive_from_config(config),
        special_tokens=special_tokens,
        seed=config.data.seed,
        groups=groups,
        stop=stop,
    )
    groups = groups.for_decoding()
    writes = groups.is_first_of_replica
    with ended_by_all():
        for shard, _ in rounds(missing, "teacher responses", groups, prompts_per_shard):
            trajectories = engine.generate(
                [prompts[index] for index in shard], config.rollout.max_response_length
            )
            if writes and shard:
                store.write(shard, [t.response_ids.tolist() for t in trajectories])
