"""Loops of attention in decoding, and of draws.

S: rows, tokens; n: query heads, g: key/value heads; d: head size; R: sequences; v: columns of the
vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray
from numpy import float32

from megatron_dlm.cpu_loops.exponential import exp
from megatron_dlm.cpu_loops.loop import Doubles, Floats, Integers, helper, loop


@helper("reassoc")
def _softmax(scores: Any, count: int, end: int) -> None:
    """Weights of the first `count` scores, at least one, in their place; then zeros to `end`."""
    of = scores.dtype.type
    top = scores[0]
    for i in range(1, count):
        top = max(top, scores[i])
    total = of(0)
    if scores.itemsize == 4:
        for i in range(count):
            scores[i] = exp(scores[i] - top)
            total += scores[i]
    else:
        for i in range(count):
            scores[i] = np.exp(scores[i] - top)
            total += scores[i]
    for i in range(count):
        scores[i] /= total
    for i in range(count, end):
        scores[i] = of(0)


@helper("reassoc")
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


@helper("reassoc")
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


@loop()
def paged_attention(
    query: Floats,
    key: Floats,
    value: Floats,
    tokens: int,
    groups: int,
    shared: int,
    size: int,
    cache: Floats,
    positions: int,
    page_size: int,
    write: Integers,
    tables: Integers,
    firsts: Integers,
    ends: Integers,
    sequences: int,
    pages: int,
    reach: Integers,
    scale: float,
    where: Integers,
    scores: Floats,
    longest: int,
    tile: int,
    context: Floats,
) -> None:
    """Store keys and values of all tokens; those of some sequences attend to what is stored.

    Args:
        query: [S, n, d], those of a sequence one after the other.
        key: [S, g, d].
        value: [S, g, d].
        tokens: S.
        groups: g.
        shared: n / g.
        size: d.
        cache: [2, positions, g, d].
        positions: Those of all pages.
        page_size: Positions of a page.
        write: [S], where a token is stored.
        tables: [R, pages], pages of a sequence in order.
        firsts: [R], first token of each sequence.
        ends: [R], one past its last one.
        sequences: R.
        pages: Of the longest sequence.
        reach: [S], at least 1: the first position that a token does not see.
        scale: Factor on the scores.
        where: [longest] of scratch.
        scores: [tile * shared, longest] of scratch.
        longest: The greatest `reach`, and three.
        tile: Tokens of a sequence that attend at once: its keys are read once for all of them.
        context: [S, n, d], zeros; then the result, of tokens of these sequences.
    """
    query = carray(query, (tokens, groups * shared, size))
    context = carray(context, (tokens, groups * shared, size))
    key, value = carray(key, (tokens, groups, size)), carray(value, (tokens, groups, size))
    cache, write = carray(cache, (2, positions, groups, size)), carray(write, tokens)
    tables, reach = carray(tables, (sequences, pages)), carray(reach, tokens)
    firsts, ends = carray(firsts, sequences), carray(ends, sequences)
    where, scores = carray(where, longest), carray(scores, (tile * shared, longest))
    factor = query.dtype.type(scale)
    for token in range(tokens):
        at = write[token]
        for group in range(groups):
            for i in range(size):
                cache[0, at, group, i] = key[token, group, i]
                cache[1, at, group, i] = value[token, group, i]
    for row in range(sequences):
        for first in range(firsts[row], ends[row], tile):
            end = min(first + tile, ends[row])
            keys = reach[first]
            for token in range(first + 1, end):
                keys = max(keys, reach[token])
            for position in range(keys):
                page = tables[row, position // page_size]
                where[position] = page * page_size + position % page_size
            for i in range(3):
                where[keys + i] = where[keys - 1]
            seen = where[: keys + 3]
            for group in range(groups):
                _products(query, cache[0], first, end, group, seen, factor, scores)
                for token in range(first, end):
                    for head in range(shared):
                        own = scores[(token - first) * shared + head]
                        _softmax(own, reach[token], keys + 3)
                _add_rows(scores, cache[1], first, end, group, seen, context)


@loop("reassoc", only_float32=True)
def draw_from_rows(
    logits: Floats,
    uniforms: Doubles,
    rows: int,
    columns: int,
    temperature: float,
    weights: Floats,
    sums: Doubles,
    columns_of_sum: int,
    output: Doubles,
) -> None:
    """See `row_draws.draw_from_rows`: logits [S, v], uniforms [S] -> output [3, S].

    Weights of `columns_of_sum` columns are summed apart. Of scratch: weights [v], sums [number of
    these sums].
    """
    logits, uniforms = carray(logits, (rows, columns)), carray(uniforms, rows)
    parts = -(-columns // columns_of_sum)
    weights, sums, output = carray(weights, columns), carray(sums, parts), carray(output, (3, rows))
    lowest = np.finfo(np.float32).min
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
            weight = exp(shifted)
            mass += weight
            moment += weight * shifted
            weights[i] = weight
        if temperature != 0 and temperature != 1:
            for i in range(columns):
                weights[i] = exp((x[i] - top) / float32(temperature))
        total = 0.0
        for part in range(parts):
            sum_ = 0.0
            for i in range(part * columns_of_sum, min((part + 1) * columns_of_sum, columns)):
                sum_ += weights[i]
            sums[part] = sum_
            total += sum_
        column = -1
        if temperature != 0 and np.isfinite(top) and np.isfinite(total):
            # Below the total also where the product is rounded.
            target = min(uniforms[row] * total, (1 - 2.0**-53) * total)
            reached, part = 0.0, 0
            while part < parts - 1 and reached + sums[part] <= target:
                reached += sums[part]
                part += 1
            # The last one that is likely, where sums are rounded otherwise.
            for i in range(part * columns_of_sum, columns):
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
            output[1, row] = output[2, row] = np.nan
