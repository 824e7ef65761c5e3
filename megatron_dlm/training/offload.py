"""What a phase of training does not use waits in host memory.

A rollout batch goes through three phases: rollout, teacher, update; answers to held-out prompts
are a fourth. Weights and optimizer state that sit idle in a phase give up their device memory by
emptying their storages; every tensor on such a storage (parameter, view, tied weight) stays what it
is and has its values again once the storage is filled. Values are copied, never recomputed: results
are the same bit for bit.

Of Megatron-Core's own helpers only the one for gradients serves: that for the optimizer would take
float32 parameters, which are their own main weights, away from the rollout as well.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.activity import ACTIVITY
from megatron_dlm.config.schema import Config
from megatron_dlm.teacher.base import Teacher
from megatron_dlm.training.student import Student

Phase = Literal["rollout", "teacher", "update", "evaluation"]


class HostedTensors:
    """Tensors that are on the device or in host memory, all at once.

    Args:
        tensors: Lists them; asked each time, since an optimizer's state grows.
        constant: Whether their values never change, so that one copy serves for good.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], *, constant: bool) -> None:
        self._tensors = tensors
        self._constant = constant
        self._hosted: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}
        """By storage: its bytes in host memory, pinned for CUDA and kept for the next time."""
        self._offloaded = False

    def offload(self) -> None:
        """Copy to the host and free the device's memory."""
        if self._offloaded:
            return
        storages = _storages(self._tensors())
        known, self._hosted = self._hosted, {}
        for key, storage in storages.items():
            if key in known:
                self._hosted[key] = known[key]
            else:
                pinned = platform.is_cuda()
                host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
                self._hosted[key] = (storage, host)
            if key not in known or not self._constant:
                self._hosted[key][1].copy_(_bytes(storage), non_blocking=True)
        platform.synchronize()
        for storage in storages.values():
            storage.resize_(0)
        self._offloaded = True

    def restore(self) -> None:
        """Take the device's memory again and fill it."""
        if not self._offloaded:
            return
        for storage, host in self._hosted.values():
            storage.resize_(host.numel())
            _bytes(storage).copy_(host, non_blocking=True)
        platform.synchronize()
        self._offloaded = False


class _Gradients:
    """Gradient buffers, whose content no phase but the update needs."""

    def __init__(self, chunks: Sequence[DistributedDataParallel]) -> None:
        self._chunks = chunks

    def offload(self) -> None:
        """Free them."""
        for chunk in self._chunks:
            chunk.offload_grad_buffers(empty_cache=False)

    def restore(self) -> None:
        """Take their memory again, zeroed."""
        for chunk in self._chunks:
            chunk.restore_grad_buffers()


class PhaseOffload:
    """Moves what a phase needs onto the device and everything else off it.

    Args:
        residents: What can be moved, each with the phases in which it has to be on the device.
    """

    def __init__(self, residents: list[tuple[HostedTensors | _Gradients, set[Phase]]]) -> None:
        self._residents = residents

    def enter(self, phase: Phase) -> None:
        """Begin a phase, with what it needs."""
        ACTIVITY.enter(phase)
        if not self._residents:
            return
        for tensors, phases in self._residents:
            if phase not in phases:
                tensors.offload()
        platform.release_memory()
        for tensors, phases in self._residents:
            if phase in phases:
                tensors.restore()


def build_offload(config: Config, student: Student, teacher: Teacher | None) -> PhaseOffload:
    """What `--offload-teacher` and `--offload-optimizer` ask for."""
    residents: list[tuple[HostedTensors | _Gradients, set[Phase]]] = []
    if config.distillation.offload_teacher:
        assert teacher is not None
        assert teacher.model is not None
        head = [] if teacher.head is None else [teacher.head]
        body = _without([*teacher.model.parameters(), *teacher.model.buffers()], head)
        residents += [
            (HostedTensors(lambda: body, constant=True), {"teacher"}),
            # The loss multiplies the teacher's hidden states by its head.
            (HostedTensors(lambda: head, constant=True), {"teacher", "update"}),
        ]
    if config.optimizer.offload_optimizer:
        weights = [*student.model.parameters(), *student.model.buffers()]

        def optimizer_tensors() -> list[Tensor]:
            # In float32 the optimizer updates the model's own parameters, which rollouts run on.
            return _without(_optimizer_tensors(student.optimizer), weights)

        residents += [
            (HostedTensors(optimizer_tensors, constant=False), {"update"}),
            (_Gradients(student.ddp), {"update"}),
        ]
    return PhaseOffload(residents)


def _optimizer_tensors(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """Main weights and state of Megatron's optimizer."""
    chained = isinstance(optimizer, ChainedOptimizer)
    for part in optimizer.chained_optimizers if chained else [optimizer]:
        if getattr(part, "optimizer", None) is None:  # a rank without experts of its own
            continue
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _without(tensors: Iterable[Tensor], others: Iterable[Tensor]) -> list[Tensor]:
    """Those that share no storage with the others."""
    kept = _storages(others)
    return [tensor for tensor in tensors if tensor.untyped_storage()._cdata not in kept]


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """The storages of tensors on the compute device, each once."""
    storages = (t.untyped_storage() for t in tensors if t.device == platform.device())
    return {storage._cdata: storage for storage in storages}


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
