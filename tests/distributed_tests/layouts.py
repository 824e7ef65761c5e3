"""How tests state a parallel layout."""

from typing import Any, NamedTuple

TP, PP, VIRTUAL, CP, EP, ETP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_virtual_stages_per_pipeline_rank",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
SP = dict(sequence_parallel=True)
DISTRIBUTED_OPTIMIZER = dict(use_distributed_optimizer=True)
OVERLAP = dict(DISTRIBUTED_OPTIMIZER, overlap_grad_reduce=True, overlap_param_gather=True)
RECOMPUTATION = dict(recompute_granularity="full")


class Layout(NamedTuple):
    """How a model is spread over processes; with `variants` for more runs than the others."""

    processes: int
    model: str
    options: dict[str, Any]
    variants: bool = False
