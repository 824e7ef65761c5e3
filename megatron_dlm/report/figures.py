"""Line charts and bar charts as inline SVG: sharp in print, no script, no library to draw them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

COLORS = ("#1f6fb4", "#d9722b", "#2e8b57", "#8e5bb5", "#b53a3a", "#5d6b78", "#b8860b", "#0f8b8d")
"""Of the runs, in their order, from the start again after the last."""

WIDTH, HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 40

_MOST_POINTS = 240
"""Of a line: more than the pixels show apart are averaged."""

_LOGARITHMIC_FROM = 30.0
"""Ratio of largest to smallest value from which a scale that may be logarithmic is."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A curve of one run.

    Attributes:
        label: Name of the run.
        color: As SVG writes it.
        points: (x, y), x ascending.
    """

    label: str
    color: str
    points: Points


def line_chart(
    lines: Sequence[Line], x_label: str, unit: str, *, may_be_logarithmic: bool = False
) -> str:
    """Curves over the same axes as an `<svg>` element.

    Args:
        lines: At least one, none of them empty.
        x_label: What x is.
        unit: What y is.
        may_be_logarithmic: Whether a scale by powers of ten is right for values that span more
            than a factor of 30.
    """
    lines = [Line(line.label, line.color, averaged(line.points, _MOST_POINTS)) for line in lines]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    smallest = min(ys)
    is_logarithmic = (
        may_be_logarithmic and smallest > 1e-300 and max(ys) / smallest > _LOGARITHMIC_FROM
    )
    left = 0.0 if 0 < min(xs) < 0.1 * max(xs) else min(xs)
    x_ticks, y_ticks = ticks(left, max(xs)), scale_ticks(ys, is_logarithmic)
    place_x = _scale(left, max(xs), _LEFT, WIDTH - _RIGHT)
    low, high = min(y_ticks[0], smallest), max(y_ticks[-1], max(ys))
    place_y = _scale(low, high, HEIGHT - _BOTTOM, _TOP, is_logarithmic)
    parts = _axes(place_x, place_y, x_ticks, y_ticks, x_label, unit)
    for line in lines:
        places = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in line.points)
        last = f"{escape(line.label)}: {compact(line.points[-1][1])} at the end"
        parts.append(
            f'<polyline points="{places}" fill="none" stroke="{line.color}" stroke-width="1.6"'
            f' stroke-linejoin="round"><title>{last}</title></polyline>'
        )
        if len(line.points) < 40:
            parts += [
                f'<circle cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="2.4"'
                f' fill="{line.color}"><title>{escape(line.label)}: {compact(y)} at'
                f" {compact(x)}</title></circle>"
                for x, y in line.points
            ]
    return _svg(parts)


def averaged(points: Points, most: int) -> Points:
    """Points as they are, or at most `most` means of stretches of equal length in points."""
    if len(points) <= most:
        return points
    means = []
    for i in range(most):
        part = points[i * len(points) // most : (i + 1) * len(points) // most]
        means.append((part[-1][0], sum(y for _, y in part) / len(part)))
    return means


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers at equal distances from the first at or below `low` to `high` or above."""
    size = max(abs(low), abs(high))
    if size < 1e-280:
        return [0.0, 1.0]
    if high - low <= 1e-6 * size:
        low, high = low - size / 2, high + size / 2
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def scale_ticks(values: Sequence[float], is_logarithmic: bool) -> list[float]:
    """Ticks of the vertical scale, which has zero in it unless all values are far from it."""
    low, high = min(values), max(values)
    if is_logarithmic:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        every = max(1, (last - first) // 6)
        return [10.0**exponent for exponent in range(first, last + 1, every)]
    return ticks(0.0 if 0 < low < 0.4 * high or low == high > 0 else low, high)


def compact(value: float) -> str:
    """A number in few characters: 1.2k, 3.4M, 0.012, 1e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scale = 1e3 if letter == "k" else limit
            return f"{value / scale:.4g}{letter}" if size < 1e15 else f"{value:.3g}"
    return f"{value:.4g}"


def _scale(
    low: float, high: float, start: float, end: float, is_logarithmic: bool = False
) -> Callable[[float], float]:
    """Maps low to start and high to end."""
    if is_logarithmic:
        low, high = math.log10(low), math.log10(high)

    def place(value: float) -> float:
        value = math.log10(value) if is_logarithmic else value
        share = 0.5 if high == low else (value - low) / (high - low)
        return start + share * (end - start)

    return place


def _axes(
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_label: str,
    unit: str,
) -> list[str]:
    bottom, right, parts = HEIGHT - _BOTTOM, WIDTH - _RIGHT, []
    for tick in y_ticks:
        y = place_y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" class="end">{compact(tick)}</text>')
    for tick in x_ticks:
        x = place_x(tick)
        if not _LEFT - 0.5 <= x <= right + 0.5:  # beyond the data
            continue
        anchor = "end" if x > right - 12 else "middle"
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        )
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" class="{anchor}">{compact(tick)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" class="middle">{escape(x_label)}</text>')
    height = (_TOP + bottom) / 2
    parts.append(
        f'<text transform="translate(13 {height}) rotate(-90)" class="middle">{escape(unit)}</text>'
    )
    return parts


def _svg(parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">'
        + "".join(parts)
        + "</svg>"
    )
