"""Megatron-Core on a CPU with gloo: stand-ins for the CUDA calls it makes unconditionally.

Never imported on CUDA. Each stand-in does the same on the CPU: the current device is the CPU,
streams order nothing, "the CUDA generator" is torch's default generator.
`torch.cuda.is_available()` still returns False.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._device  # PyTorch imports it with the first device context only

from megatron_dlm.megatron_internals import replace_generator_state
from megatron_dlm.platform.in_order import stream_calls

# Megatron-Core's `jit_fuser` is torch.compile, whose fused kernels need a C++ compiler at run time
# and save nothing on a CPU.
_FUSER_OFF = "TORCHDYNAMO_DISABLE"

_applied = False


def _is_cuda(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a tensor factory so that `device="cuda"` means the CPU and nothing is pinned."""

    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapper


_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


def _patch_torch() -> None:
    cuda: Any = torch.cuda
    cpu = torch.device("cpu")
    answers: dict[str, Any] = {
        **stream_calls(),
        "current_device": lambda: cpu,
        "synchronize": lambda device=None: None,
        # torch.manual_seed would call back into torch.cuda.manual_seed and recurse.
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": lambda seed: torch.default_generator.manual_seed(seed),
        "get_rng_state": lambda device=None: torch.default_generator.get_state(),
        "set_rng_state": lambda state, device=None: torch.default_generator.set_state(state),
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    # A device context (`with torch.device("meta")`) recognises factories by identity and looks them
    # up once: it must see the originals, which the wrappers call.
    torch.utils._device._device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))

    tensor_type = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The optimizers recognise parameters by these type names.
        if not args and not kwargs and self.dtype in _TYPE_NAMES:
            return _TYPE_NAMES[self.dtype]
        return tensor_type(self, *args, **kwargs)

    tensor: Any = torch.Tensor
    tensor.type = type_name
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.record_stream = lambda self, stream: None
    module: Any = torch.nn.Module
    module.cuda = lambda self, *args, **kwargs: self


def _ints(sizes: Any) -> list[int] | None:
    return None if sizes is None else [int(size) for size in sizes]


def _same_shapes(tensors: Sequence[torch.Tensor]) -> bool:
    return len({tensor.shape for tensor in tensors}) == 1


def _patch_collectives() -> None:
    """Make gloo take inputs of the MoE dispatcher as NCCL does: numpy sizes, uneven shards."""
    collectives: Any = dist
    all_to_all_single, all_gather, reduce_scatter = (
        dist.all_to_all_single,
        dist.all_gather,
        dist.reduce_scatter,
    )

    @functools.wraps(all_to_all_single)
    def with_int_splits(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        return all_to_all_single(
            output, input, _ints(output_split_sizes), _ints(input_split_sizes), **kwargs
        )

    @functools.wraps(all_gather)
    def all_gather_uneven(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, **kwargs: Any
    ) -> Any:
        if _same_shapes(tensor_list):
            return all_gather(tensor_list, tensor, group=group, **kwargs)
        tensor_list[dist.get_rank(group)].copy_(tensor)
        for rank, shard in enumerate(tensor_list):
            dist.broadcast(shard, group_src=rank, group=group)
        return None

    @functools.wraps(reduce_scatter)
    def reduce_scatter_uneven(
        output: torch.Tensor, input_list: list[torch.Tensor], group: Any = None, **kwargs: Any
    ) -> Any:
        if _same_shapes(input_list):
            return reduce_scatter(output, input_list, group=group, **kwargs)
        for rank, shard in enumerate(input_list):
            part = shard.clone()
            dist.reduce(part, group_dst=rank, group=group)
            if rank == dist.get_rank(group):
                output.copy_(part)
        return None

    collectives.all_to_all_single = with_int_splits
    collectives.all_gather = all_gather_uneven
    collectives.reduce_scatter = reduce_scatter_uneven


def _patch_megatron() -> None:
    def get_state(
        device: Any = None, clone: bool = False, graph_safe: bool = False
    ) -> torch.Tensor:
        return torch.default_generator.get_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.default_generator.set_state(new_state)

    replace_generator_state(get_state, set_state)


def apply() -> None:
    """Make Megatron-Core run on this CPU. Idempotent."""
    global _applied
    if _applied:
        return
    os.environ[_FUSER_OFF] = "1"
    _patch_torch()
    _patch_collectives()
    _patch_megatron()
    _applied = True
