"""Counts what a piece of code asks of a device: kernels, bytes, copies, waits, collectives.

A kernel is an operation of PyTorch on tensors of the device that is no view and changes no
metadata only; a function under `torch.compile` counts as one. CUDA may need two kernels for one
operation, or one for many (`_foreach`), so a count is of the order of the launches, and what it is
compared with is a count. The numbers do not depend on the machine, nor on whether the tensors are
real (`fake_cuda`).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

_NO_KERNEL = {
    "_unsafe_view",
    "_reshape_alias",
    "alias",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "is_same_size",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "resize_",
    "set_",
    "is_pinned",
    "record_stream",
}
"""Operations that are no view and launch nothing."""

_READS_NOTHING = {"fill_", "zero_", "zeros", "ones", "full", "arange", "normal_", "uniform_"}
"""Operations that only write, whatever their inputs are."""

_READS_AT_INDICES = {"embedding", "gather", "index", "index_select"}
_WRITES_AT_INDICES = {"index_add_", "index_copy_", "index_put_", "scatter_", "scatter_add_"}

_WAITS = {
    "_local_scalar_dense": "item",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "bincount": "bincount",
    "equal": "equal",
    "repeat_interleave": "repeat_interleave",  # unless the host says how long the result is
}
"""Operations whose result has a shape, or a value, that the host has to wait for."""


@dataclass
class Counts:
    """What a piece of code asked of the device.

    Attributes:
        kernels: Launches.
        bytes: Read and written by kernels: each tensor operand once.
        copies_to_device: From the host.
        blocking_copies_to_device: Those among them that the host waits for: from memory that is not
            page-locked, or without `non_blocking`.
        copies_after_products: Those to the device that come after a matrix product: what the host
            prepares so late keeps the device waiting.
        copies_to_host: Back; the host waits for each.
        synchronisations: Other waits of the host for the device: `.item()`, shapes that depend on
            values, an explicit wait.
        collectives: Calls of `torch.distributed` on tensors of the device.
        collective_bytes: Of this rank's inputs and outputs of them.
        by_name: Kernels, copies, waits and collectives by name.
    """

    kernels: int = 0
    bytes: int = 0
    copies_to_device: int = 0
    blocking_copies_to_device: int = 0
    copies_after_products: int = 0
    copies_to_host: int = 0
    synchronisations: int = 0
    collectives: int = 0
    collective_bytes: int = 0
    by_name: Counter[str] = field(default_factory=Counter)


class OperationCounter(TorchDispatchMode):
    """Within it, counts the operations on tensors that are not on the host.

    Attributes:
        counts: So far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self._fused = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._fused:
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self._count(func, inputs, outputs, args, kwargs)
        return result

    def _count(
        self,
        func: Any,
        inputs: list[Tensor],
        outputs: list[Tensor],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> None:
        name = func._schema.name.partition("::")[2]
        here = [tensor for tensor in (*inputs, *outputs) if _on_device(tensor)]
        if not here:
            return
        if func.namespace == "c10d":
            self.counts.collectives += 1
            self.counts.collective_bytes += _bytes(here)
            self.counts.by_name[f"collective {name}"] += 1
            return
        if name in ("_to_copy", "copy_"):
            # copy_(to, from), _to_copy(from) -> to
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], outputs[0])
            if _on_device(source) != _on_device(target):
                self._count_copy(source, target, kwargs, args)
                return
        is_wait = name in _WAITS and kwargs.get("output_size") is None
        if is_wait or (name.startswith("index") and _selects_by_mask(args)):
            self.counts.synchronisations += 1
            self.counts.by_name[f"wait {_WAITS.get(name, 'mask')}"] += 1
            if name == "_local_scalar_dense":
                return
        if any(not _on_device(tensor) and tensor.dim() for tensor in inputs):
            # Such as host indices of a device tensor, which PyTorch copies itself.
            self.counts.copies_to_device += 1
            self.counts.blocking_copies_to_device += 1
            self.counts.by_name[f"copy to device in {name}"] += 1
        if func.is_view or name in _NO_KERNEL:
            return
        self.count_kernel(name, inputs, outputs)

    def _count_copy(
        self, source: Tensor, target: Tensor, kwargs: dict[str, Any], args: Sequence[Any]
    ) -> None:
        if not _on_device(target):
            self.counts.copies_to_host += 1
            self.counts.by_name["copy to host"] += 1
            return
        self.counts.copies_to_device += 1
        self.counts.copies_after_products += self.counts.by_name["mm"] > 0
        self.counts.by_name["copy to device"] += 1
        asynchronous = kwargs.get("non_blocking", len(args) > 2 and args[2])
        if not (asynchronous and source.is_pinned()):
            self.counts.blocking_copies_to_device += 1

    def count_kernel(self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Add a launch."""
        self.counts.kernels += 1
        self.counts.by_name[name] += 1
        self.counts.bytes += _traffic(name, inputs, outputs)

    def count_wait(self, name: str) -> None:
        """Add a wait that is no operation, such as `torch.cuda.synchronize`."""
        self.counts.synchronisations += 1
        self.counts.by_name[f"wait {name}"] += 1

    def count_graph(self) -> None:
        """Add a launch of a graph of kernels."""
        self.counts.kernels += 1
        self.counts.by_name["graph"] += 1

    def take(self) -> Counts:
        """The counts so far; what follows is counted from zero."""
        taken, self.counts = self.counts, Counts()
        return taken

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Operations within are not counted: they are parts of one kernel."""
        self._fused += 1
        try:
            yield
        finally:
            self._fused -= 1


def active_counters() -> list[OperationCounter]:
    """The counters that this code runs within."""
    return [
        mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, OperationCounter)
    ]


def as_one_kernel(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function that counts as one kernel, as if it were compiled."""

    def called(*args: Any, **kwargs: Any) -> Any:
        counters = active_counters()
        stack = [counter.as_one() for counter in counters]
        for entered in stack:
            entered.__enter__()
        try:
            result = function(*args, **kwargs)
        finally:
            for entered in stack:
                entered.__exit__(None, None, None)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for counter in counters:
            counter.count_kernel(name, inputs, outputs)
        return result

    return called


def _on_device(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def _selects_by_mask(args: Sequence[Any]) -> bool:
    return len(args) > 1 and any(
        isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
        for index in (args[1] if isinstance(args[1], (list, tuple)) else ())
    )


def _traffic(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    """Bytes that an operation reads and writes."""
    if name in _READS_NOTHING:
        return _bytes(outputs)
    if name in _READS_AT_INDICES:
        return _bytes(inputs[1:]) + 2 * _bytes(outputs)
    if name in _WRITES_AT_INDICES:
        # The table itself is neither read nor written where no index points to.
        return _bytes(inputs[1:]) + _bytes(inputs[-1:])
    return _bytes(inputs) + _bytes(outputs)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(_bytes_of(tensor) for tensor in tensors)


def _bytes_of(tensor: Tensor) -> int:
    """Of a tensor's elements; those that it repeats (`expand`) are read once."""
    if not tensor.numel():
        return 0
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in strides if stride) * tensor.element_size()
