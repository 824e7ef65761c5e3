"""Counts the bytes that a piece of code holds on a device: now, and at most.

Every storage counts from the operation that makes it until nothing refers to it any more. So the
count has what PyTorch's allocator would hand out, without rounding and without the workspaces of
kernels. It does not depend on whether tensors are real (`fake_cuda`); what one compiled kernel
makes for itself is not counted.
"""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from megatron_dlm.accounting.operations import OperationCounter


class LiveMemory(OperationCounter):
    """Within it, counts the bytes of tensors.

    Args:
        on_host: Whether to count tensors of the host, where that is the device, instead of those
            that are elsewhere.

    Attributes:
        now: Bytes of storages that are alive.
        most: The largest `now` since the last `begin`.
    """

    def __init__(self, *, on_host: bool = False) -> None:
        super().__init__()
        self.now = self.most = 0
        self._on_host = on_host
        self._alive: dict[int, int] = {}

    def begin(self) -> int:
        """Begin a phase: what is alive is the most so far.

        Returns:
            The most of the phase before.
        """
        most, self.most = self.most, self.now
        return most

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count what it makes."""
        result = func(*args, **(kwargs or {}))
        if not self._fused:
            self._add(result)
        return result

    def count_kernel(self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Add what a compiled kernel returns."""
        self._add(outputs)

    def _add(self, made: Any) -> None:
        for tensor in _tensors(made):
            if (tensor.device.type == "cpu") != self._on_host:
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if size == 0 or key in self._alive:
                continue
            self._alive[key] = size
            self.now += size
            weakref.finalize(storage, self._remove, key)
        self.most = max(self.most, self.now)

    def _remove(self, key: int) -> None:
        self.now -= self._alive.pop(key)


def _tensors(made: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor))
