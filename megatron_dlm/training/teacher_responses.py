"""The AR teacher's responses to the prompts of a run, generated once with a KV cache.

The missing shards of the store are dealt out to the data-parallel ranks. Draws are keyed by the
prompt's place in the file, so the responses depend neither on the layout nor on interruptions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state

from megatron_dlm.config import Config
from megatron_dlm.data.prompts import ExampleDataset, PromptDataset
from megatron_dlm.data.response_store import ResponseStore
from megatron_dlm.data.tokenizer import SpecialTokens
from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.training.initialize import errors_on_all_ranks

if TYPE_CHECKING:
    from megatron_dlm.training.inputs import RunInputs

PROMPTS_PER_SHARD = 512
"""Prompts in one shard: what an interruption can lose on a rank."""


def teacher_responses(
    config: Config, inputs: RunInputs, teacher: DiffusionGPTModel
) -> ExampleDataset:
    """The teacher's response to every prompt of the run; generates what is missing. Collective.

    Args:
        config: The run's configuration.
        inputs: With prompts and the store of responses.
        teacher: This rank's part of the teacher.

    Raises:
        UserError: The folder cannot be used.
    """
    prompts, store = inputs.data, inputs.response_store
    assert isinstance(prompts, PromptDataset)
    assert store is not None
    vocab_size = inputs.architecture.vocab_size
    generate_missing(config, store, prompts, teacher, inputs.special_tokens, vocab_size)
    with errors_on_all_ranks():
        responses = store.read()
    return prompts.with_responses(responses, inputs.special_tokens.eos_token_id)


def generate_missing(
    config: Config,
    store: ResponseStore,
    prompts: PromptDataset,
    teacher: DiffusionGPTModel,
    special_tokens: SpecialTokens,
    vocab_size: int,
    prompts_per_shard: int = PROMPTS_PER_SHARD,
) -> None:
    """Complete a store; all ranks call this.

    Args:
        config: Decoding settings and the longest response.
        store: What exists and what is missing.
        prompts: All prompts.
        teacher: This rank's part of the teacher.
        special_tokens: Of the tokenizer.
        vocab_size: Ids from here on are never drawn.
        prompts_per_shard: Most prompts of a shard, where the store is new.
    """
    dp_rank = parallel_state.get_data_parallel_rank()
    dp_size = parallel_state.get_data_parallel_world_size()
    rank_zero = torch.distributed.get_rank() == 0
    missing: list[list[range]] = [[]]
    if rank_zero:
        # With few prompts, every rank still has a shard to answer.
        store.create(min(prompts_per_shard, -(-len(prompts) // dp_size)))
        missing = [store.missing()]
    torch.distributed.broadcast_object_list(missing, src=0)
    rollout = config.rollout
    engine = RolloutEngine(
        teacher,
        generation=GenerationConfig.autoregressive(
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            max_running_requests=rollout.max_running_requests,
        ),
        eos_token_id=special_tokens.eos_token_id,
        pad_token_id=special_tokens.pad_token_id,
        mask_token_id=special_tokens.mask_token_id,
        vocab_size=vocab_size,
        seed=config.data.seed,
    )
    writes = (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_pipeline_model_parallel_rank() == 0
    )
    for start in range(0, len(missing[0]), dp_size):
        # Every rank decodes in every round, if only nothing: experts are shared between ranks.
        shards = missing[0][start : start + dp_size][dp_rank : dp_rank + 1]
        for shard in shards or [range(0)]:
            trajectories = engine.generate(
                [prompts[index] for index in shard], rollout.max_response_length
            )
            if writes and shards:
                store.write(shard, [t.response_ids.tolist() for t in trajectories])
        if rank_zero:
            done = min(start + dp_size, len(missing[0]))
            print(f"teacher responses: {done}/{len(missing[0])} shards", flush=True)
    torch.distributed.barrier()
