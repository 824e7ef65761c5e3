"""details.md: every measured number, and the papers' claims with a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.study.claims import CLOSE_POINTS, SOLVING, papers_claims, plateau_claims
from benchmarks.study.recipes import BLOCK_SIZES, TRAINED_BLOCK_SIZE, Recipe
from benchmarks.study.statistics import Result
from benchmarks.study.tables import (
    claims_table,
    cost_table,
    forgetting_table,
    missing_list,
    settings_table,
)


def render_details(study: dict[str, Any], known: Sequence[Recipe], outdated: Sequence[str]) -> str:
    """The details of the report.

    Args:
        study: results.json.
        known: The recipes that it can be about.
        outdated: Cells that ran before recipe or method changed.
    """
    results: list[Result] = study["cells"]
    incomplete = missing_list(results, study["expected"])
    sections = [
        "# The objectives side by side on the tiny model: details",
        "The findings are in the [report](report.md). "
        "Written by `make study` from [results.json](results.json); all numbers, means and "
        "verdicts are computed.",
        f"**Incomplete.** Missing cells: {incomplete}." if incomplete else "",
        "**Of an earlier version.** Recipe or golden losses have changed since these cells ran, at "
        f"the commits named below; `make study` runs them again: {', '.join(outdated)}."
        if outdated
        else "",
        "## The papers' claims",
        "Both sides are means ± sample standard deviation over seeds; accuracy and its losses in "
        "points, speed in tokens per forward. A claim of *more* is supported if the first side "
        "exceeds the second by more than one standard deviation over seeds (pooled), not "
        "supported if it falls short by more, and not distinguishable in between. *Close* means "
        f"within {CLOSE_POINTS:g} points; not distinguishable is what differs by less than one "
        "standard deviation that is itself larger. Answers show no forgetting, and are not "
        f"distinguishable, if no run of either side solves {SOLVING:g} % of the problems of the "
        "kind that its corpus has. The papers' models are a thousand times larger and their "
        "problems are others, so only directions are compared.",
        claims_table(papers_claims(results)),
        "## Within reach of the teacher",
        claims_table(plateau_claims(results)),
        f"## Decoded with blocks of {TRAINED_BLOCK_SIZE}",
        settings_table(results, known, TRAINED_BLOCK_SIZE),
        "![Accuracy against tokens per forward](accuracy_vs_speed.png)",
        "## Decoded with larger blocks",
        f"Trained with blocks of {TRAINED_BLOCK_SIZE}, which no paper claims to work, where the "
        "recipe does not say otherwise.",
    ]
    for size in BLOCK_SIZES:
        if size != TRAINED_BLOCK_SIZE:
            sections += [f"Blocks of {size}:", settings_table(results, known, size)]
    forgetting = forgetting_table(results, known)
    if forgetting is not None:
        sections += [
            "## Forgetting in continual pretraining",
            _FORGETTING.format(
                problems=study["sizes"]["pretraining_heldout"],
                teachers=study["sizes"]["heldout"],
                block_size=TRAINED_BLOCK_SIZE,
            ),
            forgetting,
            "![Losses of continual pretraining](forgetting.png)",
        ]
    sections += [
        "## Tokens per forward over training",
        "![Tokens per forward of rollouts](rollout_speed.png)",
        "Mean over seeds and their range. Prefill and commits need no forwards of their own. SFT "
        "and off-policy distillation have no rollouts.",
        "## Cost of training",
        cost_table(results, known),
        "Response tokens are generated or read ones, counted once however often they are trained "
        "on. Seconds are of one process beside other cells and other work, so they do not compare "
        "speeds; before 2026-11-29 they include the start of the process and the generation of the "
        "teacher's responses.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


_FORGETTING = (
    "The corpus holds problems that add and subtract (seen) and none that multiply (unseen), but "
    "for the last row, whose corpus has both: what it solves of the unseen kind and the row before "
    "does not, that one has lost. The AR model that training starts from solves both. Losses are "
    "the objective's, nats per token: "
    "seen on the last twentieth of a corpus that is read once, unseen on held-out documents that "
    "multiply, at the end of training. The order of documents and their masks follow from the "
    "seed: the unseen loss of a seed is measured on the same states at all updates and under all "
    "recipes. While it falls it shows learning; its rise above its own minimum shows forgetting. "
    "Accuracies are on held-out problems of each "
    "kind, decoded by diffusion (full attention and shifted, as trained; static, one token a step, "
    "in blocks of {block_size}, which training does not have), and with the same weights read out "
    "autoregressively under a causal mask. The first two recipes train attention "
    "at the same rate; by group, everything else has RND1's ratio to it (1e-8 / 3e-4)."
    " Both kinds have {problems} problems each, {teachers} for the AR teacher."
)
