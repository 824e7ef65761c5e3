"""CUDA without CUDA: the code of a GPU runs on a CPU build of PyTorch, on tensors without data.

Within `fake_cuda` there is one CUDA device. Its tensors have shape, type and device, but no memory,
so models of any size are built in a second. They are PyTorch's meta tensors, which here say that
they are on `cuda:0`. (`FakeTensorMode` can do the same only where PyTorch is built with CUDA:
elsewhere its CUDA tensors can neither be indexed nor differentiated.) Tensors of the host are real:
planning and bookkeeping really run. An operation that mixes the two raises, as on a GPU; so does
`.item()` on a tensor of the device, unless Megatron-Core calls it, and any tensor of the host while
a graph is captured. A copy to the host gives zeros, or what the host had copied there.
Process groups are of the backend `fake`, and any rank of any world can be played.

What it changes in PyTorch stays changed: use a process of its own, and enter it before anything of
Megatron-Core is imported.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_dlm.accounting.operations import active_counters, as_one_kernel
from megatron_dlm.platform.in_order import stream_calls

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
_META = torch.device("meta")
_MEMORY = 80 << 30  # bytes, all of them free

_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}
_TAKES_HOST_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_"}


class DeviceRead(RuntimeError):
    """The host reads a value of the device, for which it would have to wait."""


class NotCapturable(RuntimeError):
    """While a graph is captured, a number comes from the host: replays would repeat it."""


class DeviceMismatch(RuntimeError):
    """An operation has operands on the host and on the device."""


class _Graph:
    """A graph of kernels on tensors without data: to replay it changes nothing.

    Attributes:
        capturing: Whether one is being captured.
    """

    capturing = False

    def pool(self) -> tuple[int, int]:
        """Memory that graphs may share."""
        return (0, 1)

    def replay(self) -> None:
        """One launch."""
        for counter in active_counters():
            counter.count_graph()

    @classmethod
    @contextmanager
    def capture(
        cls, graph: "_Graph", pool: Any = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        """In the place of `torch.cuda.graph`."""
        cls.capturing = True
        try:
            yield
        finally:
            cls.capturing = False


class _Device(TorchDispatchMode):
    """What operations on tensors of the device do that meta tensors do not."""

    def __init__(self) -> None:
        super().__init__()
        self._known = WeakTensorKeyDictionary()  # values that the host gave, and nothing changed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # here, meta tensors are what they are
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        to_device = kwargs.get("device") == _META and func is aten._to_copy.default
        if not to_device and not any(tensor.is_meta for tensor in tensors):
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            return _collective(func, args)
        if func is aten._to_copy.default and _is_host(kwargs.get("device")):
            known = self._known.get(args[0])
            if known is None:
                known = torch.zeros(args[0].shape)
            return known.to(kwargs.get("dtype") or args[0].dtype, copy=True)
        if _Graph.capturing and any(not tensor.is_meta and tensor.dim() for tensor in tensors):
            raise NotCapturable(f"{func}: an operand is on the host")
        if func is aten._to_copy.default and not args[0].is_meta:
            result = torch.empty(
                args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=_META
            )
            self._known[result] = args[0].clone()
            return result
        if func._schema.is_mutable:
            for tensor in tensors:
                self._known.pop(tensor, None)
        if func is aten.copy_.default:
            return args[0] if args[0].is_meta else args[0].zero_()
        if func is aten._local_scalar_dense.default:
            return _read(args[0])
        name = func._schema.name.partition("::")[2]
        if name not in _TAKES_HOST_INDICES:
            for tensor in tensors:
                if not tensor.is_meta and tensor.dim():
                    raise DeviceMismatch(f"{name}: operands are on {DEVICE} and on the host")
        return func(*args, **kwargs)


def _is_host(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _read(tensor: Tensor) -> Any:
    """A made-up value of a tensor, for Megatron-Core only.

    Raises:
        DeviceRead: This package asks for it.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("megatron.core", "torch.optim")):
            return False if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1
        if module.startswith("megatron_dlm") and not module.startswith("megatron_dlm.accounting"):
            raise DeviceRead(f"{module}, line {frame.f_lineno}, reads a value of the device")
        frame = frame.f_back
    raise DeviceRead("the host reads a value of the device")


def _collective(func: Any, args: Any) -> Any:
    """What a collective returns: its outputs and a handle of work that is done."""
    from torch._C._distributed_c10d import FakeWork

    work = FakeWork().boxed()
    return work if len(func._schema.returns) == 1 else (args[0], work)


class _Calls(TorchFunctionMode):
    """Makes calls for the CUDA device calls for meta tensors, and these say that they are on it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        answer = _ANSWERS.get(func)
        if answer is not None and isinstance(args[0], Tensor) and args[0].is_meta:
            return answer(*args, **kwargs)
        if func is torch.device:
            return func(*args, **kwargs)
        if kwargs.pop("pin_memory", False):
            tensor: Any = func(*args, **kwargs)
            tensor.is_pinned = lambda: True
            return tensor
        if func is Tensor.cuda:
            return args[0].to(_META)
        if func is torch.tensor and _is_device(kwargs.get("device")):
            del kwargs["device"]
            return torch.tensor(*args, **kwargs).to(_META)
        args = [_META if _is_device(arg) else arg for arg in args]
        if _is_device(kwargs.get("device")) or isinstance(kwargs.get("device"), int):
            kwargs["device"] = _META
        return func(*args, **kwargs)


def _is_device(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and (value == "cuda" or value.startswith("cuda:"))


def _type(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    return tensor.type(*args, **kwargs) if args or kwargs else _TYPE_NAMES[tensor.dtype]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """One kernel, as on CUDA: for meta tensors, PyTorch takes the steps of a softmax one by one."""
    if enable_gqa:
        key, value = (
            x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value)
        )
    bias = None
    if attn_mask is not None:
        bias = attn_mask.expand(*query.shape[:3], key.shape[2])
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(
                ~attn_mask, -torch.inf
            )
            bias = bias.expand(*query.shape[:3], key.shape[2])
    needs_grad = torch.is_grad_enabled() and query.requires_grad
    context: Tensor = aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, needs_grad, dropout_p, is_causal, scale=scale
    )[0]
    return context


class _RMSNorm(torch.autograd.Function):
    """One kernel forward and two backward, as on CUDA; for meta tensors PyTorch has the steps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _kernel("rms_norm", (x, weight), x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return (
            _kernel("rms_norm backward", (x, weight, gradient), x),
            _kernel("rms_norm backward", (x, gradient), weight),
        )


def _kernel(name: str, inputs: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """The result of a kernel, of the shape of `like`."""
    result: Tensor = as_one_kernel(lambda *_: torch.empty_like(like), name)(*inputs)
    return result


def _rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor, eps: float | None = None) -> Any:
    return _RMSNorm.apply(x, weight)


class _FlexAttention(torch.autograd.Function):
    """One kernel forward and two backward, as compiled on CUDA."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = _kernel("flex_attention", (query, key, value), query)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, _ = ctx.saved_tensors
        operands = (query, key, value, gradient)
        name = "flex_attention backward"
        # One kernel for queries; that for keys also writes the values' gradient.
        of_key = _kernel(name, operands, key)
        return _kernel(name, operands, query), of_key, torch.empty_like(value)


def _flex_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    return _FlexAttention.apply(query, key, value)


_getters: Any = Tensor
_ANSWERS: dict[Any, Callable[..., Any]] = {
    _getters.device.__get__: lambda tensor, *_: DEVICE,
    _getters.is_cuda.__get__: lambda tensor, *_: True,
    _getters.is_cpu.__get__: lambda tensor, *_: False,
    _getters.is_meta.__get__: lambda tensor, *_: False,
    Tensor.get_device: lambda tensor: DEVICE.index,
    Tensor.type: _type,
    Tensor.data_ptr: lambda tensor: tensor.untyped_storage()._cdata,
    Tensor.tolist: lambda tensor: _read(tensor),
    F.scaled_dot_product_attention: _attention,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
}


def _compile(function: Any = None, **options: Any) -> Any:
    """Stands for `torch.compile`: what it compiles counts as one kernel."""
    if function is None:
        return lambda decorated: _compile(decorated, **options)
    if function is flex_attention:
        return _flex_attention
    name = getattr(function, "__name__", type(function).__name__)
    return as_one_kernel(function, f"compiled {name}")


def _synchronize(device: Any = None) -> None:
    for counter in active_counters():
        counter.count_wait("synchronize")


@functools.cache
def _patch_torch() -> None:
    cuda: Any = torch.cuda
    answers: dict[str, Any] = {
        **stream_calls(),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 8,
        "current_device": lambda: DEVICE.index,
        "synchronize": _synchronize,
        "CUDAGraph": _Graph,
        "graph": _Graph.capture,
        "mem_get_info": lambda device=None: (_MEMORY, _MEMORY),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "default_generators": (torch.Generator(),),
        "get_rng_state": lambda device=None: torch.default_generator.get_state(),
        "set_rng_state": lambda state, device=None: None,
    }
    random: Any = torch.cuda.random
    for name, answer in answers.items():
        setattr(cuda, name, answer)
        if hasattr(random, name):
            setattr(random, name, answer)
    torch_: Any = torch
    torch_.compile = _compile
    # A PyTorch that is built for CUDA would ask the driver.
    torch_.accelerator.current_stream = answers["current_stream"]
    torch_._C._cuda_getDevice = lambda: DEVICE.index
    autograd: Any = torch.autograd
    run_backward = autograd._engine_run_backward

    def run_backward_on_device(*args: Any, **kwargs: Any) -> Any:
        with _Calls():  # PyTorch leaves modes before it runs a backward pass
            return run_backward(*args, **kwargs)

    autograd._engine_run_backward = run_backward_on_device
    collectives: Any = dist
    new_group = dist.new_group

    def new_fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **{**kwargs, "backend": "fake"})

    collectives.new_group = new_fake_group


@contextmanager
def balanced_routing() -> Iterator[None]:
    """Routers within send every rank equally many tokens; only a device's values could say more."""
    from megatron_dlm.models import token_dispatch

    dispatcher: Any = token_dispatch.SortingTokenDispatcher
    exchange, read_sizes = dispatcher.token_dispatch, token_dispatch.read_sizes

    def exchange_balanced(self: Any, hidden_states: Tensor, probs: Tensor) -> Any:
        copies = len(hidden_states)  # not the tensor, which would stay alive

        def sizes_read(sizes: Tensor) -> list[list[int]]:
            read_sizes(sizes)  # the host waits for it as ever
            ranks = len(sizes)
            each, more = divmod(copies, ranks)
            return [[each + (rank < more) for rank in range(ranks)]] * ranks

        token_dispatch.read_sizes = sizes_read
        return exchange(self, hidden_states, probs)

    dispatcher.token_dispatch = exchange_balanced
    try:
        yield
    finally:
        dispatcher.token_dispatch, token_dispatch.read_sizes = exchange, read_sizes


@contextmanager
def fake_cuda(rank: int = 0, world_size: int = 1) -> Iterator[None]:
    """A process with one CUDA device, as rank `rank` of `world_size`."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _patch_torch()
    with _Device(), _Calls():
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            yield
        finally:
            dist.destroy_process_group()
