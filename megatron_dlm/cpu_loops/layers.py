"""Loops of a layer's norms, rotation and activation, forward and backward.

S: rows, tokens; h: width of a row; f: half of the width of a feed-forward layer's first product;
g: key/value heads; d: head size; H: heads of a group of `mixed`, its queries, its key and its
value.
"""

from __future__ import annotations

import numpy as np
from numba import carray
from numpy import float32

from megatron_dlm.cpu_loops.exponential import exp
from megatron_dlm.cpu_loops.loop import Floats, helper, loop

ROWS_OF_SUM = 128
"""Gradients of a weight are summed over about so many rows at a time: a long sum rounds more."""


@loop("reassoc")
def rms_norm(x: Floats, weight: Floats, rows: int, size: int, eps: float, output: Floats) -> None:
    """Of x [S, h] and weight [h] -> output [S, h]."""
    x, weight, output = carray(x, (rows, size)), carray(weight, size), carray(output, (rows, size))
    of = x.dtype.type
    for row in range(rows):
        squares = of(0)
        for i in range(size):
            squares += x[row, i] * x[row, i]
        inverse = of(1 / np.sqrt(squares / size + eps))
        for i in range(size):
            output[row, i] = x[row, i] * inverse * weight[i]


@loop("reassoc")
def rms_norm_backward(
    gradient: Floats,
    x: Floats,
    weight: Floats,
    rows: int,
    size: int,
    eps: float,
    of_x: Floats,
    of_weights: Floats,
) -> None:
    """Gradient and x [S, h], weight [h] -> of_x [S, h], of_weights [2, h].

    The latter starts as zeros; then its first row is the weight's gradient.
    """
    gradient, x, weight = (
        carray(gradient, (rows, size)),
        carray(x, (rows, size)),
        carray(weight, size),
    )
    of_x, of_weights = carray(of_x, (rows, size)), carray(of_weights, (2, size))
    of = x.dtype.type
    of_weight, part = of_weights[0], of_weights[1]
    for start in range(0, rows, ROWS_OF_SUM):
        for i in range(size):
            part[i] = 0
        for row in range(start, min(start + ROWS_OF_SUM, rows)):
            squares = along = of(0)
            for i in range(size):
                squares += x[row, i] * x[row, i]
                along += gradient[row, i] * weight[i] * x[row, i]
            inverse = of(1 / np.sqrt(squares / size + eps))
            along *= inverse * inverse / of(size)
            for i in range(size):
                part[i] += gradient[row, i] * x[row, i] * inverse
                of_x[row, i] = inverse * (gradient[row, i] * weight[i] - x[row, i] * along)
        for i in range(size):
            of_weight[i] += part[i]


@loop("reassoc")
def rotated_heads(
    mixed: Floats,
    rotation: Floats,
    query_weight: Floats,
    key_weight: Floats,
    normalises: int,
    tokens: int,
    groups: int,
    heads: int,
    size: int,
    eps: float,
    query: Floats,
    key: Floats,
    value: Floats,
) -> None:
    """Of mixed [S, g, H, d], rotation [2, S, d] -> query [S, g, H - 2, d], key, value [S, g, d]."""
    mixed, rotation = (
        carray(mixed, (tokens, groups, heads, size)),
        carray(rotation, (2, tokens, size)),
    )
    query_weight, key_weight = carray(query_weight, size), carray(key_weight, size)
    query = carray(query, (tokens, groups, heads - 2, size))
    key, value = carray(key, (tokens, groups, size)), carray(value, (tokens, groups, size))
    half = size // 2
    of = mixed.dtype.type
    for token in range(tokens):
        cos, sin = rotation[0, token], rotation[1, token, half:]
        for group in range(groups):
            for head in range(heads - 1):
                x = mixed[token, group, head]
                is_key = head == heads - 2
                output = key[token, group] if is_key else query[token, group, head]
                weight = key_weight if is_key else query_weight
                inverse = of(1)
                if normalises:
                    squares = of(0)
                    for i in range(size):
                        squares += x[i] * x[i]
                    inverse = of(1 / np.sqrt(squares / size + eps))
                for i in range(half):
                    first, second = x[i] * inverse, x[half + i] * inverse
                    if normalises:
                        first *= weight[i]
                        second *= weight[half + i]
                    output[i] = first * cos[i] - second * sin[i]
                    output[half + i] = second * cos[i] + first * sin[i]
            for i in range(size):
                value[token, group, i] = mixed[token, group, heads - 1, i]


@loop("reassoc")
def rotated_heads_backward(
    of_query: Floats,
    of_key: Floats,
    of_value: Floats,
    mixed: Floats,
    rotation: Floats,
    query_weight: Floats,
    key_weight: Floats,
    normalises: int,
    tokens: int,
    groups: int,
    heads: int,
    size: int,
    eps: float,
    of_mixed: Floats,
    of_weights: Floats,
) -> None:
    """Gradients of `rotated_heads` -> of_mixed [S, g, H, d], of_weights [5, d].

    The latter starts as zeros; then its first two rows are the gradients of both weights.
    """
    of_query = carray(of_query, (tokens, groups, heads - 2, size))
    of_key, of_value = (
        carray(of_key, (tokens, groups, size)),
        carray(of_value, (tokens, groups, size)),
    )
    mixed, rotation = (
        carray(mixed, (tokens, groups, heads, size)),
        carray(rotation, (2, tokens, size)),
    )
    query_weight, key_weight = carray(query_weight, size), carray(key_weight, size)
    of_mixed, of_weights = (
        carray(of_mixed, (tokens, groups, heads, size)),
        carray(of_weights, (5, size)),
    )
    half = size // 2
    of = mixed.dtype.type
    part, unrotated = of_weights[2:4], of_weights[4]
    tokens_of_sum = max(ROWS_OF_SUM // (groups * max(heads - 2, 1)), 1)
    for start in range(0, tokens, tokens_of_sum):
        for i in range(size):
            part[0, i] = part[1, i] = 0
        for token in range(start, min(start + tokens_of_sum, tokens)):
            cos, sin = rotation[0, token], rotation[1, token, half:]
            for group in range(groups):
                for head in range(heads - 1):
                    x, of_x = mixed[token, group, head], of_mixed[token, group, head]
                    is_key = head == heads - 2
                    gradient = of_key[token, group] if is_key else of_query[token, group, head]
                    for i in range(half):
                        unrotated[i] = gradient[i] * cos[i] + gradient[half + i] * sin[i]
                        unrotated[half + i] = gradient[half + i] * cos[i] - gradient[i] * sin[i]
                    if not normalises:
                        for i in range(size):
                            of_x[i] = unrotated[i]
                        continue
                    weight = key_weight if is_key else query_weight
                    of_weight = part[1] if is_key else part[0]
                    squares = along = of(0)
                    for i in range(size):
                        squares += x[i] * x[i]
                        along += unrotated[i] * weight[i] * x[i]
                    inverse = of(1 / np.sqrt(squares / size + eps))
                    along *= inverse * inverse / of(size)
                    for i in range(size):
                        of_weight[i] += unrotated[i] * x[i] * inverse
                        of_x[i] = inverse * (unrotated[i] * weight[i] - x[i] * along)
                for i in range(size):
                    of_mixed[token, group, heads - 1, i] = of_value[token, group, i]
        for i in range(size):
            of_weights[0, i] += part[0, i]
            of_weights[1, i] += part[1, i]


@helper()
def _sigmoid(x: float32) -> float32:
    """1 / (1 + exp(-x)) of a float32; 0 from -87 down."""
    found = float32(1) / (float32(1) + exp(min(-x, float32(87))))
    return found if x > float32(-87) else float32(0)


@loop(only_float32=True)
def swiglu(gate_and_up: Floats, rows: int, size: int, output: Floats) -> None:
    """gate_and_up [S, 2 f] -> output [S, f]."""
    gate_and_up, output = carray(gate_and_up, (rows, 2 * size)), carray(output, (rows, size))
    for row in range(rows):
        for i in range(size):
            gate = gate_and_up[row, i]
            output[row, i] = gate * _sigmoid(gate) * gate_and_up[row, size + i]


@loop(only_float32=True)
def swiglu_backward(
    gradient: Floats, gate_and_up: Floats, rows: int, size: int, result: Floats
) -> None:
    """Gradient [S, f], gate_and_up [S, 2 f] -> result [S, 2 f]."""
    gradient, gate_and_up = carray(gradient, (rows, size)), carray(gate_and_up, (rows, 2 * size))
    result = carray(result, (rows, 2 * size))
    for row in range(rows):
        for i in range(size):
            gate, up = gate_and_up[row, i], gate_and_up[row, size + i]
            sigmoid = _sigmoid(gate)
            silu = gate * sigmoid
            result[row, i] = gradient[row, i] * up * (sigmoid + silu * (float32(1) - sigmoid))
            result[row, size + i] = gradient[row, i] * silu
