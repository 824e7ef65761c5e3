"""Loops of kernels on the CPU, compiled by Numba on their first call and kept on disk.

Arrays are contiguous and of one floating type, sums are of that type. A row's result depends on
that row only. They are in one file since Numba looks at no other for what has changed.

S: rows, tokens; h: width of a row; f: half of the width of a feed-forward layer's first product;
n: query heads, g: key/value heads; d: head size; H: heads of a group of `mixed`, its queries, its
key and its value; R: sequences; v: columns of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import numpy as np
from numba import njit
from numpy import float32, int32

ROWS_OF_SUM = 128
"""Gradients of a weight are summed over about so many rows at a time: a long sum rounds more."""


def _loop(*allowed: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function; `allowed` are LLVM's freedoms with floating-point operations."""
    options: dict[str, Any] = dict(fastmath={"contract", *allowed}, error_model="numpy", nogil=True)

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        loop: Any = njit(**options)(function)
        try:
            loop.enable_caching()
            # Numba writes what names a file before the file. Its names are numbers: two processes
            # could take the same one, or one that ends in between leave older code under it.
            files = loop._cache._cache_file
            name = files._data_name_pattern.replace("{number", f"{uuid4().hex}.{{number")
            files._data_name_pattern = name
        except (RuntimeError, AttributeError):  # there is no folder to keep it in, or another Numba
            loop = njit(**options)(function)
        kept: Callable[..., Any] = loop
        return kept

    return compiled


@_loop("reassoc")
def rms_norm(x: Any, weight: Any, eps: float, output: Any) -> None:
    """Of x [S, h] and weight [h] -> output [S, h]."""
    rows, size = x.shape
    of = x.dtype.type
    for row in range(rows):
        squares = of(0)
        for i in range(size):
            squares += x[row, i] * x[row, i]
        inverse = of(1 / np.sqrt(squares / size + eps))
        for i in range(size):
            output[row, i] = x[row, i] * inverse * weight[i]


@_loop("reassoc")
def rms_norm_backward(
    gradient: Any, x: Any, weight: Any, eps: float, of_x: Any, of_weight: Any
) -> None:
    """Gradient and x [S, h], weight [h] -> of_x [S, h], of_weight [h], which starts as zeros."""
    rows, size = x.shape
    of = x.dtype.type
    part = np.empty_like(of_weight)
    for start in range(0, rows, ROWS_OF_SUM):
        part[:] = 0
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


@_loop("reassoc")
def rotated_heads(
    mixed: Any,
    rotation: Any,
    query_weight: Any,
    key_weight: Any,
    normalises: bool,
    eps: float,
    query: Any,
    key: Any,
    value: Any,
) -> None:
    """Of mixed [S, g, H, d], rotation [2, S, d] -> query [S, g, H - 2, d], key, value [S, g, d]."""
    tokens, groups, heads, size = mixed.shape
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


@_loop("reassoc")
def rotated_heads_backward(
    of_query: Any,
    of_key: Any,
    of_value: Any,
    mixed: Any,
    rotation: Any,
    query_weight: Any,
    key_weight: Any,
    normalises: bool,
    eps: float,
    of_mixed: Any,
    of_weights: Any,
) -> None:
    """Gradients of `rotated_heads` -> of_mixed [S, g, H, d], of_weights [2, d] from zeros."""
    tokens, groups, heads, size = mixed.shape
    half = size // 2
    of = mixed.dtype.type
    part = np.empty_like(of_weights)
    unrotated = np.empty(size, mixed.dtype)
    tokens_of_sum = max(ROWS_OF_SUM // (groups * max(heads - 2, 1)), 1)
    for start in range(0, tokens, tokens_of_sum):
        part[:] = 0
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
                        of_x[:] = unrotated
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
        of_weights += part


@_loop()
def _exp(x: Any) -> Any:
    """The exponential of a float32 below 88, to 2e-7, in operations that become vectors' ones.

    It is 2^n exp(r) with |r| <= log(2) / 2, where log(2) is the sum of two numbers of which n times
    the first is exact (Cody and Waite 1980), and exp(r) are eight terms of its series. Below
    -87, where it is 2e-38, it is 0.
    """
    t = max(x, float32(-87))
    n = np.floor(t * float32(1.4426950408889634) + float32(0.5))
    r = (t - n * float32(0.693359375)) + n * float32(2.121944400546905e-4)
    p = float32(1 / 5040)
    p = p * r + float32(1 / 720)
    p = p * r + float32(1 / 120)
    p = p * r + float32(1 / 24)
    p = p * r + float32(1 / 6)
    p = p * r + float32(0.5)
    p = p * r + float32(1)
    p = p * r + float32(1)
    p *= int32((int32(n) + 127) << 23).view(float32)
    return p if x >= float32(-87) else float32(0)


@_loop()
def _sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)) of a float32; 0 from -87 down."""
    found = float32(1) / (float32(1) + _exp(min(-x, float32(87))))
    return found if x > float32(-87) else float32(0)


@_loop()
def swiglu(gate_and_up: Any, output: Any) -> None:
    """gate_and_up [S, 2 f] -> output [S, f], float32."""
    rows, size = output.shape
    for row in range(rows):
        for i in range(size):
            gate = gate_and_up[row, i]
            output[row, i] = gate * _sigmoid(gate) * gate_and_up[row, size + i]


@_loop()
def swiglu_backward(gradient: Any, gate_and_up: Any, result: Any) -> None:
    """Gradient [S, f], gate_and_up [S, 2 f] -> result [S, 2 f], float32."""
    rows, size = gradient.shape
    for row in range(rows):
        for i in range(size):
            gate, up = gate_and_up[row, i], gate_and_up[row, size + i]
            sigmoid = _sigmoid(gate)
            silu = gate * sigmoid
            result[row, i] = gradient[row, i] * up * (sigmoid + silu * (float32(1) - sigmoid))
            result[row, size + i] = gradient[row, i] * silu


@_loop("reassoc")
def _softmax(scores: Any, count: int, end: int) -> None:
    """Weights of the first `count` scores, at least one, in their place; then zeros to `end`."""
    of = scores.dtype.type
    top = scores[0]
    for i in range(1, count):
        top = max(top, scores[i])
    total = of(0)
    if scores.itemsize == 4:
        for i in range(count):
            scores[i] = _exp(scores[i] - top)
            total += scores[i]
    else:
        for i in range(count):
            scores[i] = np.exp(scores[i] - top)
            total += scores[i]
    for i in range(count):
        scores[i] /= total
    for i in range(count, end):
        scores[i] = of(0)


TOKENS_OF_TILE = 16
"""Tokens of a sequence that attend at once: its keys are read once for all of them."""


@_loop("reassoc")
def _products(
    x: Any, rows: Any, first: int, end: int, group: int, where: Any, scale: Any, products: Any
) -> None:
    """Inner products of the heads of a group of some tokens with rows of that group, scaled.

    Args:
        x: [S, n, d], of which tokens `first` to `end` are taken.
        rows: [K, g, d].
        first: First token.
        end: One past the last one.
        group: The group.
        where: [k + 3] integers, rows in order; then the last one again.
        scale: Factor on the products.
        products: [tokens * heads, k + 3], the result.
    """
    size = x.shape[2]
    shared = x.shape[1] // rows.shape[1]
    for at in range(0, len(where) - 3, 4):
        r0, r1 = rows[where[at], group], rows[where[at + 1], group]
        r2, r3 = rows[where[at + 2], group], rows[where[at + 3], group]
        for token in range(first, end):
            for head in range(shared):
                own = x[token, group * shared + head]
                p0 = p1 = p2 = p3 = x.dtype.type(0)
                for i in range(size):
                    p0 += own[i] * r0[i]
                    p1 += own[i] * r1[i]
                    p2 += own[i] * r2[i]
                    p3 += own[i] * r3[i]
                into = products[(token - first) * shared + head]
                into[at], into[at + 1] = p0 * scale, p1 * scale
                into[at + 2], into[at + 3] = p2 * scale, p3 * scale


@_loop("reassoc")
def _add_rows(
    weights: Any, rows: Any, first: int, end: int, group: int, where: Any, x: Any
) -> None:
    """Add weighted rows to the heads of a group of some tokens: what `_products` takes apart."""
    size = x.shape[2]
    shared = x.shape[1] // rows.shape[1]
    for at in range(0, len(where) - 3, 4):
        r0, r1 = rows[where[at], group], rows[where[at + 1], group]
        r2, r3 = rows[where[at + 2], group], rows[where[at + 3], group]
        for token in range(first, end):
            for head in range(shared):
                own = weights[(token - first) * shared + head]
                w0, w1, w2, w3 = own[at], own[at + 1], own[at + 2], own[at + 3]
                into = x[token, group * shared + head]
                for i in range(size):
                    into[i] += w0 * r0[i] + w1 * r1[i] + w2 * r2[i] + w3 * r3[i]


@_loop()
def paged_attention(
    query: Any,
    key: Any,
    value: Any,
    cache: Any,
    page_size: int,
    write: Any,
    tables: Any,
    firsts: Any,
    ends: Any,
    reach: Any,
    scale: float,
    context: Any,
) -> None:
    """Store keys and values of all tokens; those of some sequences attend to what is stored.

    Args:
        query: [S, n, d], those of a sequence one after the other.
        key: [S, g, d].
        value: [S, g, d].
        cache: [2, positions of all pages, g, d].
        page_size: Positions of a page.
        write: [S] integers, where a token is stored.
        tables: [R, pages] integers, pages of a sequence in order.
        firsts: [R] integers, first token of each sequence.
        ends: [R] integers, one past its last one.
        reach: [S] integers, at least 1: the first position that a token does not see.
        scale: Factor on the scores.
        context: [S, n, d], zeros; then the result, of tokens of these sequences.
    """
    tokens, groups, size = key.shape
    shared = query.shape[1] // groups
    for token in range(tokens):
        at = write[token]
        for group in range(groups):
            for i in range(size):
                cache[0, at, group, i] = key[token, group, i]
                cache[1, at, group, i] = value[token, group, i]
    longest = reach.max() + 3 if tokens else 0
    where = np.zeros(longest, np.int64)
    scores = np.empty((TOKENS_OF_TILE * shared, longest), query.dtype)
    factor = query.dtype.type(scale)
    for row in range(len(ends)):
        for first in range(firsts[row], ends[row], TOKENS_OF_TILE):
            end = min(first + TOKENS_OF_TILE, ends[row])
            keys = reach[first:end].max()
            for position in range(keys):
                page = tables[row, position // page_size]
                where[position] = page * page_size + position % page_size
            where[keys : keys + 3] = where[keys - 1]
            seen = where[: keys + 3]
            for group in range(groups):
                _products(query, cache[0], first, end, group, seen, factor, scores)
                for token in range(first, end):
                    for head in range(shared):
                        own = scores[(token - first) * shared + head]
                        _softmax(own, reach[token], keys + 3)
                _add_rows(scores, cache[1], first, end, group, seen, context)


COLUMNS_OF_SUM = 64
"""Columns of a row of logits whose weights are summed apart."""


@_loop("reassoc")
def draw_from_rows(logits: Any, uniforms: Any, temperature: float, output: Any) -> None:
    """See `row_draws.draw_from_rows`: logits [S, v] float32, uniforms [S] -> output [3, S]."""
    rows, columns = logits.shape
    lowest = np.finfo(np.float32).min
    weights = np.empty(columns, np.float32)
    sums = np.empty(-(-columns // COLUMNS_OF_SUM))
    for row in range(rows):
        x = logits[row]
        top, is_number = x[0], True
        for i in range(columns):
            top = max(top, x[i])
            is_number &= x[i] == x[i]
        if not is_number:
            top = float32(np.nan)
        mass = moment = float32(0)
        for i in range(columns):
            # A logit above 1e31 would leave minus infinity, and no entropy.
            shifted = max(x[i] - top, lowest)
            weight = _exp(shifted)
            mass += weight
            moment += weight * shifted
            weights[i] = weight
        if temperature != 0 and temperature != 1:
            for i in range(columns):
                weights[i] = _exp((x[i] - top) / float32(temperature))
        total = 0.0
        for part in range(len(sums)):
            sum_ = 0.0
            for i in range(part * COLUMNS_OF_SUM, min((part + 1) * COLUMNS_OF_SUM, columns)):
                sum_ += weights[i]
            sums[part] = sum_
            total += sum_
        column = -1
        if temperature != 0 and np.isfinite(top) and np.isfinite(total):
            # Below the total also where the product is rounded.
            target = min(uniforms[row] * total, np.nextafter(total, 0.0))
            reached, part = 0.0, 0
            while part < len(sums) - 1 and reached + sums[part] <= target:
                reached += sums[part]
                part += 1
            # The last one that is likely, where sums are rounded otherwise.
            for i in range(part * COLUMNS_OF_SUM, columns):
                if weights[i] > 0:
                    column = i
                    reached += weights[i]
                    if reached > target:
                        break
        if column < 0:
            column = 0
            while x[column] != top if is_number else x[column] == x[column]:
                column += 1
        output[0, row] = column
        log_mass = np.log(np.float64(mass))
        output[1, row] = np.exp(max(x[column] - top, lowest) - log_mass)
        output[2, row] = max(log_mass - np.float64(moment) / mass, 0.0)
        if not np.isfinite(top):
            output[1:, row] = np.nan
