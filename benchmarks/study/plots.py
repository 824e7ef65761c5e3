"""The plots of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.study.claims import accuracy, speed
from benchmarks.study.recipes import BLOCK_SIZES, SETTINGS, TRAINED_BLOCK_SIZE, Recipe
from benchmarks.study.statistics import Result, mean_curve, sample


def plot_accuracy_against_speed(
    results: Sequence[Result], recipes: Sequence[Recipe], own_sizes: dict[int, str], path: Path
) -> None:
    """Accuracy against tokens per forward: every recipe, and OPDLM trained by block size."""
    own = {result["recipe"] for result in results} & set(own_sizes.values())
    panels = 2 if own else 1
    figure, axes_of_row = plt.subplots(
        1, panels, figsize=(6.5 * panels, 5), layout="constrained", squeeze=False
    )
    objectives, sizes = axes_of_row[0, 0], axes_of_row[0, -1]
    for recipe in recipes:
        if recipe.name != "teacher" and recipe.options.get("block_size") is None:
            _draw_settings(objectives, results, recipe.name, TRAINED_BLOCK_SIZE, recipe.title)
    for size in BLOCK_SIZES if own else ():
        _draw_settings(sizes, results, own_sizes[size], size, f"blocks of {size}")
    teacher = sample(results, "teacher", accuracy("autoregressive", "autoregressive"))
    for axes in axes_of_row[0]:
        if teacher is not None:
            axes.axhline(teacher.mean, color="gray", linestyle=":", label="AR teacher")
        axes.set(xlabel="tokens per forward", ylabel="held-out accuracy, %")
        axes.legend(fontsize=8)
    objectives.set_title(f"Blocks of {TRAINED_BLOCK_SIZE}: static, dynamic 0.9, 0.8, 0.7")
    if own:
        sizes.set_title("OPDLM, trained and decoded with the same block size")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_rollout_speed(results: Sequence[Result], recipes: Sequence[Recipe], path: Path) -> None:
    """Tokens per forward of rollouts over training: mean over seeds, and their range."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for recipe in recipes:
        curves = _training_curves(results, recipe)
        speeds = [curve["tokens_per_forward"] for curve in curves if "tokens_per_forward" in curve]
        if not speeds:
            continue
        mean = mean_curve(speeds)
        steps = curves[0]["step"][: len(mean)]
        (line,) = axes.plot(steps, mean, label=f"{recipe.title} (n={len(speeds)})", linewidth=1.2)
        points = list(zip(*speeds, strict=False))
        axes.fill_between(
            steps, list(map(min, points)), list(map(max, points)), color=line.get_color(), alpha=0.2
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
            mean = mean_curve([curve[loss] for curve in curves])
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
    axes.set_title("Continual pretraining: mean over seeds")
    _save(figure, axes, path)


def _training_curves(results: Sequence[Result], recipe: Recipe) -> list[dict[str, list[float]]]:
    """The curves of each seed."""
    return [
        result["training"]["curves"]
        for result in results
        if result["recipe"] == recipe.name and "training" in result
    ]


def _save(figure: Any, axes: Any, path: Path) -> None:
    """Write a figure of one panel, with a legend if there is something in it."""
    if axes.lines:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_settings(
    axes: Any, results: Sequence[Result], recipe: str, block_size: int, label: str
) -> None:
    evaluation = f"block_{block_size}"
    points = [
        (
            sample(results, recipe, speed(evaluation, setting)),
            sample(results, recipe, accuracy(evaluation, setting)),
        )
        for setting in SETTINGS
    ]
    known = [(x, y) for x, y in points if x is not None and y is not None]
    if known:
        axes.errorbar(
            [x.mean for x, _ in known],
            [y.mean for _, y in known],
            xerr=[x.std or 0 for x, _ in known],
            yerr=[y.std or 0 for _, y in known],
            marker="o",
            markersize=4,
            capsize=2,
            linewidth=1,
            label=label,
        )
