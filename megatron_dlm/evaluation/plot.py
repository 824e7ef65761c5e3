"""Accuracy against decoding speed, a point a setting."""

from __future__ import annotations

from typing import Any

from megatron_dlm.output_file import replaced_file


def accuracy_and_speed(path: str, title: str, results: dict[str, dict[str, Any]]) -> None:
    """Draw settings by tokens per forward and accuracy; several seeds have error bars.

    Args:
        path: A .png, .svg or .pdf file.
        title: Of the picture.
        results: `settings` of a results file; one without forwards counted is left out.

    Raises:
        UserError: It cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, result in results.items():
        speed, accuracy = result["tokens_per_forward"], 100 * result["accuracy"]
        if speed is None:
            continue
        error = 100 * result.get("accuracy_std", 0.0)
        # A share is not beyond 0 or 100 %.
        bars = [[min(error, accuracy)], [min(error, 100 - accuracy)]]
        axes.errorbar([speed], [accuracy], bars if error else None, fmt="o", capsize=3, label=name)
    axes.set_xlabel("tokens per forward")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(title)
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    with replaced_file(path, "--plot") as temporary:
        figure.savefig(temporary, dpi=150)
    pyplot.close(figure)
