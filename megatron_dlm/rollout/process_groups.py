"""The process groups that a rollout communicates in."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core import parallel_state
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class RolloutGroups:
    """Process groups of a rollout; None where there is a single rank.

    Attributes:
        tp: Ranks that hold the other shards of the vocabulary.
        pp: Stages of this rank's pipeline.
        pp_last_rank: Global rank of the last of them.
        lockstep: Ranks that have to make as many forwards as this one, because the forwards hold
            collectives of experts. A union of whole tensor-parallel groups, so that all ranks
            with the same prompts learn the same from a reduction over it.
    """

    tp: ProcessGroup | None = None
    pp: ProcessGroup | None = None
    pp_last_rank: int = 0
    lockstep: ProcessGroup | None = None

    @classmethod
    def from_parallel_state(cls) -> RolloutGroups:
        """The groups that Megatron-Core was initialised with."""
        tp_size = parallel_state.get_tensor_model_parallel_world_size()
        pp_size = parallel_state.get_pipeline_model_parallel_world_size()
        lockstep = None
        if parallel_state.get_expert_model_parallel_world_size() > 1:
            lockstep = parallel_state.get_expert_tensor_and_model_parallel_group()
            if lockstep.size() % tp_size != 0:
                # Groups of experts that cut through tensor-parallel groups tie neighbours together
                # all along the stage.
                lockstep = parallel_state.get_tensor_and_data_parallel_group()
        return cls(
            tp=parallel_state.get_tensor_model_parallel_group() if tp_size > 1 else None,
            pp=parallel_state.get_pipeline_model_parallel_group() if pp_size > 1 else None,
            pp_last_rank=parallel_state.get_pipeline_model_parallel_last_rank()
            if pp_size > 1
            else 0,
            lockstep=lockstep,
        )
