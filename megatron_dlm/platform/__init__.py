"""The only module that distinguishes CPU and CUDA.

`select` must run before anything of Megatron-Core is built: on a CPU it makes Megatron-Core's CUDA
calls work on the CPU (`megatron_dlm.platform.cpu`); on CUDA it changes nothing. Everything else in
this package gets its device from `device()` and never names one itself.
"""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import psutil
import torch

from megatron_dlm.entry import local_rank
from megatron_dlm.errors import bad_value
from megatron_dlm.platform.control_groups import memory_left

DeviceChoice = Literal["auto", "cpu", "cuda"]

_device: torch.device | None = None


def select(choice: DeviceChoice = "auto") -> torch.device:
    """Choose the device of this process, once.

    Args:
        choice: "cpu", "cuda", or "auto" for CUDA where there is a GPU.

    Returns:
        The device of this process; on CUDA the one of its `LOCAL_RANK`.

    Raises:
        UserError: CUDA was chosen and there is none, or the process already runs on the other kind
            of device.
    """
    global _device
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    if _device is not None:
        if _device.type != choice:
            raise bad_value(
                "--device",
                choice,
                f"this process already runs on {_device.type}",
                "start a new one",
            )
        return _device
    if choice == "cuda":
        if not torch.cuda.is_available():
            raise bad_value(
                "--device", "cuda", "this PyTorch sees no CUDA device", "use --device cpu or auto"
            )
        _device = torch.device("cuda", local_rank())
        torch.cuda.set_device(_device)
    else:
        from megatron_dlm.platform import cpu

        cpu.apply()
        _device = torch.device("cpu")
    return _device


def device() -> torch.device:
    """The device of this process; selects "auto" if nothing was selected yet."""
    return _device if _device is not None else select("auto")


@contextmanager
def on_meta() -> Iterator[None]:
    """Within, models of any size are built in no memory: `device()` is PyTorch's meta device.

    For processes that compute on a CPU; parameters have shapes and no values.
    """
    global _device
    before, _device = device(), torch.device("meta")
    try:
        yield
    finally:
        _device = before


def is_cuda() -> bool:
    """Whether this process computes on a GPU."""
    return device().type == "cuda"


def collective_backend() -> str:
    """The `torch.distributed` backend that fits the device."""
    return "nccl" if is_cuda() else "gloo"


def synchronize() -> None:
    """Wait until the device has finished, so that wall-clock times are right."""
    if is_cuda():
        torch.cuda.synchronize()


def to_device(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same tensors in the device's memory, copied at once and without waiting for the device.

    Args:
        tensors: On the CPU, of element types of 8 bytes; or all of them there already.
    """
    if not is_cuda() or all(tensor.is_cuda for tensor in tensors):
        return list(tensors)
    # Page-locked, or the copy would wait until all work that was launched before is done.
    packed = torch.empty(sum(t.numel() for t in tensors), dtype=torch.int64, pin_memory=True)
    sizes = [tensor.numel() for tensor in tensors]
    for part, tensor in zip(packed.split(sizes), tensors, strict=True):
        part.copy_(tensor.contiguous().view(torch.int64).flatten())
    parts = packed.to(device(), non_blocking=True).split(sizes)
    return [
        part.view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(parts, tensors, strict=True)
    ]


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory, for which the host waits until the device has caught up.

    Code of this package reads what the device computed in no other way, so that each of these waits
    can be found and counted: `.item()` on a tensor of the device would hide one.
    """
    return tensor.cpu()


def host_memory(size: int) -> torch.Tensor:
    """Memory of the host that the device copies to without a detour: page-locked on CUDA.

    Args:
        size: In bytes, taken as it is: PyTorch's own allocator of page-locked memory would round
            it up to a power of two.

    Returns:
        Bytes, [size], not initialised. Where they cannot be page-locked, copies take longer.
    """
    memory = torch.empty(size, dtype=torch.uint8)
    if is_cuda() and size:
        cudart: Any = torch.cuda.cudart()
        if int(cudart.cudaHostRegister(memory.data_ptr(), size, 0)) == 0:
            weakref.finalize(memory, cudart.cudaHostUnregister, memory.data_ptr())
    return memory


def free_memory() -> int | None:
    """Bytes of the device that a tensor could have now; None on a CPU, which shares its memory."""
    if not is_cuda():
        return None
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + cached


def available_memory() -> int:
    """Bytes that a tensor could have now on the device, which on a CPU are everyone's."""
    free = free_memory()
    if free is not None:
        return free
    of_host, of_container = psutil.virtual_memory().available, memory_left()
    return of_host if of_container is None else min(of_host, of_container)


def has_room(size: int) -> bool:
    """Whether this process could have so many bytes of the device now; takes none of them."""
    if size > available_memory():
        return False
    try:
        torch.empty(size, dtype=torch.uint8, device=device())
    except RuntimeError as error:
        if is_out_of_memory(error):
            return False
        raise
    return True


def is_out_of_memory(error: Exception) -> bool:
    """Whether a tensor found no memory, of the device or of the host.

    PyTorch has a type for the first alone; the other one is known by its text.
    """
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def release_memory() -> None:
    """Free cached memory that nothing refers to any more."""
    gc.collect()
    if is_cuda():
        torch.cuda.empty_cache()
