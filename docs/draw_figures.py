"""Draw the figures of the README: python docs/draw_figures.py writes docs/figures/*.svg.

The mask is computed by the rule that attention uses (`megatron_dlm.models.attention_layout`). Files
are the same for the same matplotlib; text is drawn as outlines, on a ground of its own, so that
light and dark pages show it alike.
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from megatron_dlm.models.attention_layout import CLEAN, Field, block_ids, visible
from megatron_dlm.output_file import replaced_file

FOLDER = Path(__file__).parent / "figures"

STYLE = {"svg.hashsalt": "megatron-dlm", "font.family": "DejaVu Sans", "font.size": 11}
GROUND, INK, GRID = "#ffffff", "#1f2328", "#c9d1d9"
CLEAN_COLOR, NOISY_COLOR = "#3b78c4", "#d9822b"

BLOCK_SIZE, PROMPT = 4, 4
TOKENS = 3 * BLOCK_SIZE
"""Of the sequence: a prompt of one block, a response of two."""


def mask_layout() -> torch.Tensor:
    """Layout [4, S] of a training row: the clean stream, then the noisy blocks of the response."""
    position = torch.arange(TOKENS, dtype=torch.int32)
    block = block_ids(position, "block_causal", BLOCK_SIZE)
    clean = torch.stack(
        (torch.zeros_like(position), block, torch.full_like(block, CLEAN), position)
    )
    noisy = clean[:, PROMPT:].clone()
    noisy[Field.STREAM] = CLEAN + 1
    return torch.cat((clean, noisy), dim=1)


def draw_mask(axes: Axes) -> None:
    """Who sees whom in a row of two streams."""
    layout = mask_layout()
    seen = visible(layout[:, :, None], layout[:, None, :])
    tokens = layout.shape[1]
    for query in range(tokens):
        for key in range(tokens):
            color = GROUND
            if seen[query, key]:
                color = CLEAN_COLOR if layout[Field.STREAM, key] == CLEAN else NOISY_COLOR
            axes.add_patch(
                Rectangle((key, query), 1, 1, facecolor=color, edgecolor=GRID, linewidth=0.6)
            )
    clean = TOKENS
    for edge in range(0, tokens + 1, BLOCK_SIZE):
        width = 2.4 if edge == clean else 1.1
        axes.plot([edge, edge], [0, tokens], color=INK, linewidth=width, clip_on=False)
        axes.plot([0, tokens], [edge, edge], color=INK, linewidth=width, clip_on=False)
    names = ["prompt"] + [f"block {b}" for b in range(1, clean // BLOCK_SIZE)]
    names = [f"clean\n{name}" for name in names] + [f"noisy\n{name}" for name in names[1:]]
    centres = [BLOCK_SIZE * (i + 0.5) for i in range(len(names))]
    axes.set_xticks(centres, names)
    axes.set_yticks(centres, names)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("is seen (key)", labelpad=8)
    axes.set_ylabel("sees (query)", labelpad=8)
    axes.tick_params(length=0)
    axes.set(xlim=(0, tokens), ylim=(tokens, 0), aspect="equal")
    for spine in axes.spines.values():
        spine.set_visible(False)


STEPS = (
    (
        NOISY_COLOR,
        "1  rollout (student)",
        "answers prompts by blocks;\nrecords the step at which\neach token was unmasked",
    ),
    (
        CLEAN_COLOR,
        "2  teacher (frozen)",
        "reads prompt + response once;\npredicts each response token\nfrom all that is before it",
    ),
    (
        NOISY_COLOR,
        "3  update (student)",
        "at the MASKs of visited states:\ndivergence from the teacher\nover the full vocabulary",
    ),
)
"""Color, title and text of what one round of on-policy distillation does."""

WIDTH, HEIGHT, GAP = 4.6, 1.9, 1.4


def draw_loop(axes: Axes) -> None:
    """Rollout, teacher, update, in a circle."""
    bottom, middle = 1.2, 1.2 + HEIGHT / 2
    for index, (color, title, text) in enumerate(STEPS):
        left = index * (WIDTH + GAP)
        shape = "round,pad=0.02,rounding_size=0.15"
        axes.add_patch(
            FancyBboxPatch(
                (left, bottom), WIDTH, HEIGHT, shape, facecolor=GROUND, edgecolor=color, linewidth=2
            )
        )
        centre = {"ha": "center", "va": "center"}
        x = left + WIDTH / 2
        axes.text(x, bottom + HEIGHT - 0.35, title, color=color, weight="bold", **centre)
        axes.text(x, middle - 0.25, text, color=INK, fontsize=10, **centre)
        if index:
            draw_arrow(axes, (left - GAP + 0.1, middle), (left - 0.1, middle))
            axes.text(
                left - GAP / 2, middle + 0.25, ("ids", "targets")[index - 1], color=INK, **centre
            )
    last = 2 * (WIDTH + GAP) + WIDTH / 2
    draw_arrow(axes, (last, bottom - 0.1), (WIDTH / 2, bottom - 0.1), bend=-0.12)
    axes.text(
        (last + WIDTH / 2) / 2, 0.05, "next rollout with the new weights", color=INK, ha="center"
    )
    axes.set(xlim=(-0.2, last + WIDTH / 2 + 0.2), ylim=(-0.2, 3.3), aspect="equal")
    axes.axis("off")


def draw_arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0
) -> None:
    """An arrow between two points."""
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=16,
            color=INK,
            linewidth=1.4,
            connectionstyle=style,
        )
    )


def save(draw: Callable[[Axes], None], size: tuple[float, float], name: str) -> None:
    """Draw one figure into docs/figures."""
    figure, axes = plt.subplots(figsize=size, facecolor=GROUND)
    draw(axes)
    with replaced_file(FOLDER / name) as file:
        figure.savefig(file, bbox_inches="tight", pad_inches=0.15, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Draw all figures."""
    mpl.rcParams.update(STYLE)
    FOLDER.mkdir(exist_ok=True)
    save(draw_mask, (6.4, 6.4), "mask.svg")
    save(draw_loop, (12, 2.8), "loop.svg")


if __name__ == "__main__":
    main()
