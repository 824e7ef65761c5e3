"""Which checkpoint of a run is the best by a figure on held-out data.

Each checkpoint carries its figure, `held_out.json`, so that resuming, winding back and removing
checkpoints need no bookkeeping. `best_checkpoint.json` in the run folder names the best one for
whoever looks for it. Any figure has a name and says whether higher is better: the validation loss
is one, the accuracy on held-out prompts another.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from megatron_dlm.entry import warn
from megatron_dlm.errors import UserError
from megatron_dlm.output_file import write_file
from megatron_dlm.training.manifest import replace_file
from megatron_dlm.training.run_folder import iteration_folder, saved_iterations

HELD_OUT = "held_out.json"
BEST = "best_checkpoint.json"

ACCURACY = "accuracy"
"""Beginning of the metric of a figure that is an accuracy."""


@dataclass(frozen=True)
class HeldOutFigure:
    """What was measured on held-out data after an update.

    Attributes:
        metric: Name of what is measured, e.g. `validation_loss`.
        value: The same on all ranks.
        higher_is_better: Whether a better model has a higher value.
        data: Fingerprint of what it was measured on, and how; empty if nothing of that changes.
    """

    metric: str
    value: float
    higher_is_better: bool
    data: str = ""

    def is_like(self, other: "HeldOutFigure") -> bool:
        """Whether the two can be compared."""
        return (self.metric, self.data) == (other.metric, other.data)

    @property
    def merit(self) -> float:
        """The value, or its negative where lower is better."""
        return self.value if self.higher_is_better else -self.value


def write_figure(checkpoint: Path, figure: HeldOutFigure) -> None:
    """Put a checkpoint's figure into its folder."""
    (checkpoint / HELD_OUT).write_text(_text(figure))


def add_figure(checkpoint: Path, figure: HeldOutFigure) -> None:
    """Put a figure into a published checkpoint; if it cannot be written, that is a warning."""
    try:
        replace_file(checkpoint, HELD_OUT, _text(figure))
    except (UserError, ValueError) as error:
        warn(f"{checkpoint / HELD_OUT} is not written: {error}")


def _text(figure: HeldOutFigure) -> str:
    return json.dumps(dataclasses.asdict(figure), indent=1) + "\n"


def lacks_accuracy(checkpoint: Path) -> bool:
    """Whether a checkpoint carries no accuracy on held-out prompts."""
    figure = read_figure(checkpoint)
    return figure is None or figure.metric.split("/")[0] != ACCURACY


def read_figure(checkpoint: Path) -> HeldOutFigure | None:
    """The figure of a checkpoint; None if none was measured, or if it is no finite number."""
    try:
        figure = HeldOutFigure(**json.loads((checkpoint / HELD_OUT).read_bytes()))
        return figure if math.isfinite(figure.value) else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        warn(f"{checkpoint / HELD_OUT} is left out: {error}")
        return None


def best_iteration(run_folder: str | Path, newest: int) -> int | None:
    """The best checkpoint of a run, the earliest of equals; None if none has a figure.

    Figures that cannot be compared with the latest one count no more: a run that goes on with
    another measure, or other data for it, starts anew.

    Args:
        run_folder: The run's folder.
        newest: Checkpoints after this iteration are of a run that was wound back.
    """
    figures = _figures(run_folder, newest)
    if not figures:
        return None
    latest = figures[max(figures)]
    same = {iteration: figure for iteration, figure in figures.items() if figure.is_like(latest)}
    return max(same, key=lambda iteration: (same[iteration].merit, -iteration))


def best_like(run_folder: str | Path, newest: int, figure: HeldOutFigure) -> HeldOutFigure | None:
    """The best figure of a run's checkpoints that can be compared with another; None without any.

    Args:
        run_folder: The run's folder.
        newest: See `best_iteration`.
        figure: That other one.
    """
    figures = _figures(run_folder, newest).values()
    alike = (other for other in figures if other.is_like(figure))
    return max(alike, key=lambda other: other.merit, default=None)


def _figures(run_folder: str | Path, newest: int) -> dict[int, HeldOutFigure]:
    """Figures of a run's checkpoints by iteration."""
    return {
        iteration: figure
        for iteration in saved_iterations(run_folder)
        if iteration <= newest
        and (figure := read_figure(iteration_folder(run_folder, iteration))) is not None
    }


def record_best(run_folder: str | Path, newest: int) -> int | None:
    """Name the best checkpoint in the run folder; a file that cannot be written is a warning.

    Args:
        run_folder: The run's folder.
        newest: See `best_iteration`.

    Returns:
        Its iteration.
    """
    iteration = best_iteration(run_folder, newest)
    if iteration is None:
        return None
    folder = iteration_folder(run_folder, iteration)
    figure = read_figure(folder)
    assert figure is not None
    file = Path(run_folder) / BEST
    content = {"checkpoint": folder.name, "iteration": iteration, **dataclasses.asdict(figure)}
    del content["data"]
    try:
        write_file(file, json.dumps(content, indent=1) + "\n")
    except UserError as error:
        warn(str(error))
    return iteration
