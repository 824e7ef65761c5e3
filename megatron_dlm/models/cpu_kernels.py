"""Kernels that layers have on the CPU, each in one pass over its tensors.

PyTorch has no kernel of a whole normalisation, rotation or gated activation on a CPU, and a dozen
short ones take a small model longer than its matrix products. These are loops of `cpu_loops` behind
operations of PyTorch, so that what traces a model meets one operation.

S: tokens; h: width of a row; g: key/value heads of this tensor-parallel rank, n: query heads; d:
head size; f: half of the width of a feed-forward layer's first product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_dlm.cpu_loops.library import loops_for

DTYPES = frozenset({torch.float32, torch.float64})
"""What their tensors may be of, but for SwiGLU's, which are float32."""

IMPLEMENTATIONS: dict[object, Callable[..., Any]] = {}
"""What computes an operation, for callers that know that its tensors are on the CPU."""


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
    output, size = _like(x), x.shape[-1]
    rows = x.numel() // size
    loops_for(x.dtype).rms_norm(x.contiguous(), weight.contiguous(), rows, size, eps, output)
    return output


@_operation(
    "rms_norm_backward(Tensor gradient, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    lambda gradient, x, weight, eps: (_like(x), _like(weight)),
)
def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x [..., h] and weight [h]."""
    size = x.shape[-1]
    of_x, of_weights = _like(x), x.new_zeros(2, size)
    read = (tensor.contiguous() for tensor in (gradient, x, weight))
    loops_for(x.dtype).rms_norm_backward(*read, x.numel() // size, size, eps, of_x, of_weights)
    return of_x, of_weights[0]


def _like_heads(mixed: Tensor, rotation: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens, rows, groups, width = mixed.shape
    size = rotation.shape[-1]
    query = mixed.new_empty(tokens, rows, groups * (width // size - 2), size)
    key, value = (mixed.new_empty(tokens, rows, groups, size) for _ in range(2))
    return query, key, value


def _arguments(
    mixed: Tensor, rotation: Tensor, query: Tensor | None, key: Tensor | None, eps: float
) -> tuple[Any, ...]:
    """What both loops of heads take, but for the heads: tensors, sizes, eps."""
    tokens, rows, groups, width = mixed.shape
    size = rotation.shape[-1]
    if rows != 1 or width % size or rotation.numel() != 2 * tokens * size:
        raise ValueError(f"mixed {tuple(mixed.shape)} with rotation {tuple(rotation.shape)}")
    read = (None if x is None else x.contiguous() for x in (mixed, rotation, query, key))
    normalises = query is not None and key is not None
    return *read, normalises, tokens, groups, width // size, size, eps


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
    heads = _like_heads(mixed, rotation)
    arguments = _arguments(mixed, rotation, query_weight, key_weight, eps)
    loops_for(mixed.dtype).rotated_heads(*arguments, *heads)
    return heads


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
    of_mixed, of_weights = _like(mixed), mixed.new_zeros(5, rotation.shape[-1])
    arguments = _arguments(mixed, rotation, query_weight, key_weight, eps)
    gradients = (x.contiguous() for x in (of_query, of_key, of_value))
    loops_for(mixed.dtype).rotated_heads_backward(*gradients, *arguments, of_mixed, of_weights)
    return of_mixed, of_weights[:2]


def _half(gate_and_up: Tensor) -> Tensor:
    return gate_and_up.new_empty(*gate_and_up.shape[:-1], gate_and_up.shape[-1] // 2)


@_operation("swiglu(Tensor gate_and_up) -> Tensor", _half)
def swiglu(gate_and_up: Tensor) -> Tensor:
    """silu(gate) * up of float32 [..., 2 f], gate first -> [..., f] (Shazeer 2020)."""
    output = _half(gate_and_up)
    size = output.shape[-1]
    loops_for(torch.float32).swiglu(gate_and_up.contiguous(), output.numel() // size, size, output)
    return output


@_operation(
    "swiglu_backward(Tensor gradient, Tensor gate_and_up) -> Tensor",
    lambda gradient, gate_and_up: _like(gate_and_up),
)
def swiglu_backward(gradient: Tensor, gate_and_up: Tensor) -> Tensor:
    """Gradient of gate_and_up, [..., 2 f]."""
    result, size = _like(gate_and_up), gradient.shape[-1]
    read = gradient.contiguous(), gate_and_up.contiguous()
    loops_for(torch.float32).swiglu_backward(*read, gradient.numel() // size, size, result)
    return result
