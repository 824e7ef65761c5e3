"""What this project uses of Megatron-Core that may change with any of its versions.

Names with an underscore, module variables that are replaced, attributes that Megatron-Core keeps
for itself, and functions under its public ones. They are named here and nowhere else, and `NAMES`
lists them: a test looks for each in the installed version. Where versions differ, the difference
stays in here. Tested with megatron-core 0.16.1 and 0.19.2.

Imports are in the functions: a process imports only the parts that it uses.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NAMES = (
    "dist_checkpointing.strategies.torch: MCoreSavePlanner",
    "dist_checkpointing.strategies.torch: _replace_state_dict_keys_with_sharded_keys",
    "dist_checkpointing.strategies.torch: mcore_to_pyt_state_dict",
    "fusions.fused_bias_swiglu: weighted_bias_swiglu_impl",
    "models.common.embeddings.rope_utils: fused_apply_rotary_pos_emb",
    "optimizer: ChainedOptimizer._synchronize_steps",
    "optimizer: USING_PYTORCH_OPTIMIZER",
    "optimizer.clip_grads: l2_norm_impl",
    "optimizer.clip_grads: multi_tensor_scale_impl",
    "optimizer.distrib_optimizer: DistributedOptimizer._get_main_param_and_optimizer_states",
    "optimizer.distrib_optimizer: DistributedOptimizer._init_optimizer_states_with_dummy_values",
    "optimizer.distrib_optimizer: DistributedOptimizer.gbuf_ranges",
    "pipeline_parallel.p2p_communication: P2PCommunicator._communicate",
    "pipeline_parallel.p2p_communication: P2PCommunicator._communicate_shapes",
    "pipeline_parallel.p2p_communication: _p2p_ops",
    "tensor_parallel.random: _get_cuda_rng_state",
    "tensor_parallel.random: _set_cuda_rng_state",
    "transformer.mlp: apply_swiglu_sharded_factory",
    "transformer.moe.moe_utils: get_default_pg_collection",
    "utils: _kernel_make_viewless_tensor",
    "utils: local_multi_tensor_l2_norm",
)
"""Modules below `megatron.core` and what is used of them; attributes of a class after a dot, where
`__init__` may be what creates them."""


def replace_generator_state(get: Callable[..., Tensor], set_: Callable[..., None]) -> None:
    """Read and write the state of the device's random generator by these functions."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = get
    random._set_cuda_rng_state = set_


@contextmanager
def known_grad_norm(optimizer: Any, grad_norm: Any) -> Iterator[None]:
    """Within the block an optimizer's step clips by this norm, which it would compute again.

    Args:
        optimizer: Megatron's, of one model.
        grad_norm: What its `get_grad_norm` has just returned.
    """
    optimizer.get_grad_norm = lambda: grad_norm
    try:
        yield
    finally:
        del optimizer.get_grad_norm


def replace_multi_tensor(l2_norm: Callable[..., Any], scale: Callable[..., None]) -> None:
    """Clip gradients by these functions, unless a library with kernels for it is installed.

    Args:
        l2_norm: In place of `amp_C.multi_tensor_l2norm`.
        scale: In place of `amp_C.multi_tensor_scale`.
    """
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm
        clip_grads.multi_tensor_scale_impl = scale


def adam_is_torch() -> bool:
    """Whether AdamW is PyTorch's: neither Transformer Engine nor Apex is installed."""
    from megatron.core import optimizer

    return bool(optimizer.USING_PYTORCH_OPTIMIZER)


def has_fused_rotary() -> bool:
    """Whether a kernel for rotary embeddings is installed."""
    from megatron.core.models.common.embeddings import rope_utils

    return rope_utils.fused_apply_rotary_pos_emb is not None


def weighted_swiglu(gate_and_up: Tensor, weights: Tensor) -> Tensor:
    """silu(gate) * up * weight in one kernel: [N, 2 f] and [N, 1] -> [N, f]."""
    from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl

    output: Tensor = weighted_bias_swiglu_impl(gate_and_up, None, weights)
    return output


def expert_groups() -> Any:
    """The process groups of a layer with experts, from Megatron's global state."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    return get_default_pg_collection()


def spec_submodules(spec: Any) -> Any:
    """What a layer's part is built of; megatron-core 0.19 keeps it in a `partial`."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules


def stored_by_halves(sharded: Any, sharded_offsets: Any, metadata: dict[str, Any]) -> Any:
    """A sharded tensor of gate and up whose halves are stored one after the other."""
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    singleton = metadata.get("singleton_local_shards", False)
    return apply_swiglu_sharded_factory(sharded, sharded_offsets, singleton)


def save_planner(sharded_state: dict[str, Any], is_coordinator: bool) -> Any:
    """PyTorch's planner of a distributed checkpoint, set up with a rank's sharded state."""
    from megatron.core.dist_checkpointing.strategies.torch import (
        MCoreSavePlanner,
        _replace_state_dict_keys_with_sharded_keys,
        mcore_to_pyt_state_dict,
    )

    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
        sharded_state, keep_only_main_replica=True
    )
    planner = MCoreSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(by_key), is_coordinator=is_coordinator)
    return planner


def synchronize_steps(optimizer: Any) -> None:
    """Give all optimizers of a chain the same number of updates."""
    from megatron.core.optimizer import ChainedOptimizer

    if isinstance(optimizer, ChainedOptimizer):
        optimizer._synchronize_steps()


def allocate_state(optimizer: Any) -> None:
    """Allocate the state of a distributed optimizer that has made no update."""
    optimizer._init_optimizer_states_with_dummy_values()


def held_states(optimizer: Any) -> Iterator[tuple[Any, int, dict[str, Tensor]]]:
    """What a rank of a distributed optimizer holds of each parameter.

    Args:
        optimizer: Megatron's `DistributedOptimizer`.

    Yields:
        The model's parameter, the place in it (flattened) at which this rank's piece begins, and
        tensors of the piece by name: fp32 values and the optimizer's state.
    """
    for ranges_by_dtype in optimizer.gbuf_ranges:
        for buckets in ranges_by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    values = optimizer._get_main_param_and_optimizer_states(parameter)
                    yield parameter, ranges["param"].start, values


def observe_neighbours(waiting: Callable[[], AbstractContextManager[None]]) -> None:
    """Enter a context around each exchange of Megatron's schedules with neighbouring stages.

    Args:
        waiting: Makes the context; always the same one.
    """
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    communicator: Any = P2PCommunicator
    exchange = communicator._communicate
    if hasattr(exchange, "__wrapped__"):  # since an earlier layout of this process
        return

    @functools.wraps(exchange)
    def observed(*args: Any, **kwargs: Any) -> Any:
        with waiting():
            return exchange(*args, **kwargs)

    communicator._communicate = observed


_exchange: list[Any] = []
"""Megatron-Core's own `_p2p_ops` and `_communicate_shapes`, where others stand in for them."""


def exchange_apart(gradients: Any) -> None:
    """Let schedules exchange gradients in a process group of their own, or as Megatron-Core does.

    Under virtual stages the last stage's next one is the first. Two stages then send each other
    hidden states and gradients that nothing but their order would tell apart, and they need not
    exchange them in calls of the same kinds: in the schedule's ends one stage's call has both.

    Args:
        gradients: The group of the pipeline's stages that gradients go through; None: no others
            stand in for Megatron-Core's functions.
    """
    from megatron.core.pipeline_parallel import p2p_communication as module

    communicator: Any = module.P2PCommunicator
    internals: Any = module
    if not _exchange:
        _exchange.extend((internals._p2p_ops, communicator._communicate_shapes))
    internals._p2p_ops, communicator._communicate_shapes = _exchange
    if gradients is None:
        return

    def post(through: Any, sent: Any, to: int, received: Any, of: int) -> tuple[list[Any], ...]:
        """Start messages in one group: works that end with what is received, and the others."""
        operations = []
        if sent is not None:
            operations.append(dist.P2POp(dist.isend, sent, to, through))
        if received is not None:
            operations.append(dist.P2POp(dist.irecv, received, of, through))
        works = dist.batch_isend_irecv(operations) if operations else []
        if received is None:
            return [], works
        return works[-1:], works[:-1]

    def exchanged(
        *,
        tensor_send_prev: Tensor | None,
        tensor_recv_prev: Tensor | None,
        tensor_send_next: Tensor | None,
        tensor_recv_next: Tensor | None,
        group: Any,
        prev_pipeline_rank: int,
        next_pipeline_rank: int,
    ) -> dict[str, Any]:
        before, after = prev_pipeline_rank, next_pipeline_rank
        received, sent = post(group, tensor_send_next, after, tensor_recv_prev, before)
        more_received, more_sent = post(
            gradients, tensor_send_prev, before, tensor_recv_next, after
        )
        return {
            **{f"receive_{i}": work for i, work in enumerate(received + more_received)},
            **{f"send_{i}": work for i, work in enumerate(sent + more_sent)},
        }

    under_way: list[Any] = []

    def shapes(self: Any, to_next: Any, to_previous: Any, previous: bool, following: bool) -> Any:
        def shape_of(tensor: Tensor | None) -> Tensor:
            sizes = [0, 0, 0] if tensor is None else list(tensor.shape)
            return torch.tensor(sizes, device=torch.cuda.current_device())

        for work, _ in under_way:  # what followed these has been received
            work.wait()
        under_way.clear()
        told = [None if tensor is None else shape_of(tensor) for tensor in (to_next, to_previous)]
        of_previous, of_next = shape_of(None), shape_of(None)
        works = exchanged(
            tensor_send_prev=told[1],
            tensor_recv_prev=of_previous if previous else None,
            tensor_send_next=told[0],
            tensor_recv_next=of_next if following else None,
            group=self.pp_group,
            prev_pipeline_rank=self.prev_rank,
            next_pipeline_rank=self.next_rank,
        )
        for name, work in works.items():
            # A stage that waited for its shapes to arrive would not receive what has to come first.
            if name.startswith("receive"):
                work.wait()
            else:
                under_way.append((work, told))
        return of_previous.tolist(), of_next.tolist()

    internals._p2p_ops, communicator._communicate_shapes = exchanged, shapes


@contextmanager
def neighbour_shapes(shape: Sequence[int]) -> Iterator[None]:
    """Pipeline stages within take every row to be of this shape, without asking a neighbour."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    communicator: Any = P2PCommunicator
    ask = communicator._communicate_shapes

    def told(self: Any, to_next: Any, to_previous: Any, previous: bool, following: bool) -> Any:
        nothing = [0] * len(shape)
        return list(shape) if previous else nothing, list(shape) if following else nothing

    communicator._communicate_shapes = told
    try:
        yield
    finally:
        communicator._communicate_shapes = ask


@contextmanager
def views_kept() -> Iterator[None]:
    """Within, Megatron-Core does not make tensors of views by replacing a tensor's memory.

    It does so to free what a view is of; an operation that is recorded would not be seen.
    """
    from megatron.core import utils

    make = utils._kernel_make_viewless_tensor
    utils._kernel_make_viewless_tensor = lambda inp, requires_grad: inp
    try:
        yield
    finally:
        utils._kernel_make_viewless_tensor = make
