"""The plots of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from numpy.typing import NDArray

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.study.claims import accuracy, speed
from benchmarks.study.recipes import SETTINGS, TRAINED_BLOCK_SIZE, Recipe
from benchmarks.study.statistics import Result, Sample, sample
from megatron_dlm.output_file import replaced_file

_DASHES = cycler(linestyle=["-", "--", ":"])
"""Of lines whose colours are used up."""


def plot_accuracy_against_speed(
    results: Sequence[Result], recipes: Sequence[Recipe], path: Path
) -> None:
    """Accuracy against tokens per forward of every recipe: mean over seeds, and their range."""
    figure, axes = plt.subplots(figsize=(8, 6.2), layout="constrained")
    axes.set_prop_cycle(_DASHES * plt.rcParams["axes.prop_cycle"])
    for recipe in recipes:
        if recipe.name != "teacher":
            _draw_settings(axes, results, recipe)
    teacher = sample(results, "teacher", accuracy("autoregressive", "autoregressive"))
    if teacher is not None:
        axes.axhline(teacher.mean, color="gray", linestyle=":", label="AR teacher")
    axes.set(xlabel="tokens per forward", ylabel="held-out accuracy, %", ylim=(-3, 103))
    axes.set_title(
        f"Blocks of {TRAINED_BLOCK_SIZE}: static, dynamic 0.9, 0.8, 0.7; mean and range of seeds"
    )
    _save(figure, axes, path)


def plot_rollout_speed(results: Sequence[Result], recipes: Sequence[Recipe], path: Path) -> None:
    """Tokens per forward of rollouts over training: mean over seeds, and their range."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.set_prop_cycle(_DASHES * plt.rcParams["axes.prop_cycle"])
    for recipe in recipes:
        curves = _training_curves(results, recipe)
        speeds = [curve["tokens_per_forward"] for curve in curves if "tokens_per_forward" in curve]
        if not speeds:
            continue
        points = _aligned(speeds)
        steps = curves[0]["step"][: len(points)]
        label = f"{recipe.title} (n={len(speeds)})"
        (line,) = axes.plot(steps, points.mean(axis=1), label=label, linewidth=1.2)
        axes.fill_between(
            steps, points.min(axis=1), points.max(axis=1), color=line.get_color(), alpha=0.2
        )
    axes.set(xlabel="optimizer step", ylabel="tokens per forward")
    axes.set_title("Rollouts over training")
    _save(figure, axes, path)


def plot_forgetting(results: Sequence[Result], recipes: Sequence[Recipe], path: Path) -> None:
    """Losses of continual pretraining: on its corpus, and on held-out documents of another kind."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for recipe in recipes:
        curves = _training_curves(results, recipe)
        if not any("validation_loss" in curve for curve in curves):
            continue
        losses = {
            "seen": ("step", "loss", "--"),
            "unseen": ("validation_step", "validation_loss", "-"),
        }
        color = None
        for kind, (steps, loss, style) in losses.items():
            mean = _aligned([curve[loss] for curve in curves]).mean(axis=1)
            (line,) = axes.plot(
                curves[0][steps][: len(mean)],
                mean,
                style,
                color=color,
                linewidth=1.2,
                label=f"{recipe.title}, {kind} (n={len(curves)})",
            )
            color = line.get_color()
    axes.set(xlabel="optimizer step", ylabel="diffusion loss, nats per token", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title("Continual pretraining: mean over seeds")
    _save(figure, axes, path)


def _training_curves(results: Sequence[Result], recipe: Recipe) -> list[dict[str, list[float]]]:
    """The curves of each seed."""
    return [
        result["training"]["curves"]
        for result in results
        if result["recipe"] == recipe.name and "training" in result
    ]


def _aligned(curves: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Curves over the same steps as columns, cut where the shortest ends."""
    return np.array(list(zip(*curves, strict=False)))


def _save(figure: Any, axes: Any, path: Path) -> None:
    """Write a figure of one panel, with a legend below it if there is something in it."""
    if axes.lines:
        figure.legend(fontsize=8, loc="outside lower center", ncols=2, handlelength=4)
    with replaced_file(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def to_extremes(samples: Sequence[Sample]) -> NDArray[np.float64]:
    """Distances [2, samples] from the mean to the least and the greatest seed.

    No bar ends where no seed was. Seeds can lie in two groups, some at 0 % and some near 100 %:
    their standard deviation would reach beyond both.
    """
    return np.array(
        [
            [max(0.0, each.mean - min(each.values)) for each in samples],
            [max(0.0, max(each.values) - each.mean) for each in samples],
        ]
    )


def _draw_settings(axes: Any, results: Sequence[Result], recipe: Recipe) -> None:
    evaluation = f"block_{TRAINED_BLOCK_SIZE}"
    points = [
        (
            sample(results, recipe.name, speed(evaluation, setting)),
            sample(results, recipe.name, accuracy(evaluation, setting)),
        )
        for setting in SETTINGS
    ]
    known = [(x, y) for x, y in points if x is not None and y is not None]
    if known:
        axes.errorbar(
            [x.mean for x, _ in known],
            [y.mean for _, y in known],
            xerr=to_extremes([x for x, _ in known]),
            yerr=to_extremes([y for _, y in known]),
            marker="o",
            markersize=4,
            capsize=2,
            linewidth=1.2,
            elinewidth=0.8,
            label=recipe.title,
        )
