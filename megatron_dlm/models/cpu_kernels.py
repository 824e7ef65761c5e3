"""Kernels that layers have on the CPU, each in one pass over its tensors.

PyTorch has no kernel of a whole normalisation, rotation or gated activation on a CPU, and a dozen
short ones take a small model longer than its matrix products. These are loops that Numba compiles
(`cpu_loops`), behind operations of PyTorch, so that what traces a model meets one operation.

S: tokens; h: width of a row; g: key/value heads of this tensor-parallel rank, n: query heads; d:
head size; f: half of the width of a feed-forward layer's first product.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = frozenset({torch.float32, torch.float64})
"""What their tensors may be of, but for SwiGLU's, which are float32."""

IMPLEMENTATIONS: dict[object, Callable[..., Any]] = {}
"""What computes an operation, for callers that know that its tensors are on the CPU."""


@functools.cache
def loops() -> ModuleType:
    """`megatron_dlm.cpu_loops`."""
    # Numba takes half a second to import: not for those who have no use for it.
    from megatron_dlm import cpu_loops

    return cpu_loops


_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def array_of(x: Tensor) -> np.ndarray:
    """A float32 or float64 tensor's memory, or that of a contiguous copy.

    `Tensor.numpy` would forbid for ever to give that memory back, as offloading does. So an array
    must not be used after its tensor was offloaded.
    """
    x = x.contiguous()
    if not x.numel():
        return np.empty(x.shape, _DTYPES[x.dtype])
    memory: Any = (ctypes.c_char * x.nbytes).from_address(x.data_ptr())
    memory.tensor = x  # not to be freed before
    return np.ndarray(x.shape, _DTYPES[x.dtype], memory)


def _rows(x: Tensor) -> Any:
    return array_of(x).reshape(-1, x.shape[-1])


def _operation(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register a function as an operation on the CPU, with what its results are like."""

    def registered(function: Callable[..., Any]) -> Any:
        name = "megatron_dlm::" + schema.partition("(")[0]
        torch.library.define(name, schema.removeprefix(schema.partition("(")[0]))
        torch.library.impl(name, "CPU", function)
        torch.library.register_fake(name, fake)
        operation = getattr(torch.ops.megatron_dlm, schema.partition("(")[0]).default
        IMPLEMENTATIONS[operation] = function
        return operation

    return registered


def _like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_operation("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _like)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [..., h] with weight [h] (Zhang and Sennrich 2019)."""
    output = _like(x)
    loops().rms_norm(_rows(x), array_of(weight), eps, _rows(output))
    return output


@_operation(
    "rms_norm_backward(Tensor gradient, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    lambda gradient, x, weight, eps: (_like(x), _like(weight)),
)
def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x [..., h] and weight [h]."""
    of_x, of_weight = _like(x), torch.zeros_like(weight)
    arrays = _rows(gradient), _rows(x), array_of(weight)
    loops().rms_norm_backward(*arrays, eps, _rows(of_x), array_of(of_weight))
    return of_x, of_weight


def _like_heads(mixed: Tensor, rotation: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens, rows, groups, width = mixed.shape
    size = rotation.shape[-1]
    query = mixed.new_empty(tokens, rows, groups * (width // size - 2), size)
    key, value = (mixed.new_empty(tokens, rows, groups, size) for _ in range(2))
    return query, key, value


def _weights(query: Tensor | None, key: Tensor | None, like: Tensor) -> tuple[Any, Any, bool]:
    """Weights of queries and keys, and whether there are any."""
    if query is None or key is None:
        none = array_of(like.new_empty(0))
        return none, none, False
    return array_of(query), array_of(key), True


def _by_head(x: Tensor, size: int) -> Any:
    """[S, 1, g, H d] -> [S, g, H, d]."""
    return array_of(x).reshape(x.shape[0], x.shape[2], x.shape[3] // size, size)


@_operation(
    "rotated_heads(Tensor mixed, Tensor rotation, Tensor? query_weight, Tensor? key_weight,"
    " float eps) -> (Tensor, Tensor, Tensor)",
    _like_heads,
)
def rotated_heads(
    mixed: Tensor,
    rotation: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What attention takes, from the product of its first layer.

    Args:
        mixed: [S, 1, g, (n / g + 2) d], the queries of a group, its key and its value.
        rotation: [2, S, 1, 1, d], see `self_attention.rotation`.
        query_weight: [d], of the normalisation of each query; None: there is none.
        key_weight: [d], of the keys.
        eps: Of both.

    Returns:
        Queries [S, 1, n, d] and keys [S, 1, g, d], normalised and rotated; values [S, 1, g, d].
    """
    query, key, value = _like_heads(mixed, rotation)
    tokens, _, groups, size = key.shape
    loops().rotated_heads(
        _by_head(mixed, size),
        array_of(rotation).reshape(2, tokens, size),
        *_weights(query_weight, key_weight, mixed),
        eps,
        array_of(query).reshape(tokens, groups, query.shape[2] // groups, size),
        array_of(key)[:, 0],
        array_of(value)[:, 0],
    )
    return query, key, value


def _like_gradients(
    of_query: Tensor, of_key: Tensor, of_value: Tensor, mixed: Tensor, rotation: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return _like(mixed), mixed.new_empty(2, rotation.shape[-1])


@_operation(
    "rotated_heads_backward(Tensor of_query, Tensor of_key, Tensor of_value, Tensor mixed,"
    " Tensor rotation, Tensor? query_weight, Tensor? key_weight, float eps) -> (Tensor, Tensor)",
    _like_gradients,
)
def rotated_heads_backward(
    of_query: Tensor,
    of_key: Tensor,
    of_value: Tensor,
    mixed: Tensor,
    rotation: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of mixed, and of the weights of queries and keys, [2, d]."""
    of_mixed = _like(mixed)
    tokens, _, groups, size = of_key.shape
    of_weights = mixed.new_zeros(2, size)
    loops().rotated_heads_backward(
        array_of(of_query).reshape(tokens, groups, of_query.shape[2] // groups, size),
        array_of(of_key)[:, 0],
        array_of(of_value)[:, 0],
        _by_head(mixed, size),
        array_of(rotation).reshape(2, tokens, size),
        *_weights(query_weight, key_weight, mixed),
        eps,
        _by_head(of_mixed, size),
        array_of(of_weights),
    )
    return of_mixed, of_weights


def _half(gate_and_up: Tensor) -> Tensor:
    return gate_and_up.new_empty(*gate_and_up.shape[:-1], gate_and_up.shape[-1] // 2)


@_operation("swiglu(Tensor gate_and_up) -> Tensor", _half)
def swiglu(gate_and_up: Tensor) -> Tensor:
    """silu(gate) * up of float32 [..., 2 f], gate first -> [..., f] (Shazeer 2020)."""
    output = _half(gate_and_up)
    loops().swiglu(_rows(gate_and_up), _rows(output))
    return output


@_operation(
    "swiglu_backward(Tensor gradient, Tensor gate_and_up) -> Tensor",
    lambda gradient, gate_and_up: _like(gate_and_up),
)
def swiglu_backward(gradient: Tensor, gate_and_up: Tensor) -> Tensor:
    """Gradient of gate_and_up, [..., 2 f]."""
    result = _like(gate_and_up)
    loops().swiglu_backward(_rows(gradient), _rows(gate_and_up), _rows(result))
    return result


def compile_all() -> None:
    """Compile, for later processes, what updates and rollouts of a float32 model call."""
    tokens, size = 2, 4
    x, weight = torch.ones(tokens, 1, size), torch.ones(size)
    rms_norm_backward(rms_norm(x, weight, 0.0), x, weight, 0.0)
    mixed, rotation = torch.ones(tokens, 1, 1, 3 * size), torch.ones(2, tokens, 1, 1, size)
    heads = rotated_heads(mixed, rotation, weight, weight, 0.0)
    rotated_heads_backward(*heads, mixed, rotation, weight, weight, 0.0)
    swiglu_backward(swiglu(x), x)
    slots = np.arange(tokens)
    loops().paged_attention(
        *(array_of(part)[:, 0] for part in heads),
        np.zeros((2, tokens, 1, size), np.float32),
        tokens,
        slots,
        slots[:1, None],
        slots[:1],
        slots[1:] + 1,
        slots + 1,
        1.0,
        array_of(torch.zeros_like(heads[0]))[:, 0],
    )
    loops().draw_from_rows(array_of(x)[:, 0], np.zeros(tokens), 1.0, np.zeros((3, tokens)))
