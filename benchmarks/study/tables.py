"""The tables of the report, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.study.claims import (
    Claim,
    Quantity,
    accuracy,
    final_loss,
    format_sample,
    speed,
)
from benchmarks.study.recipes import BLOCK_SIZES, SETTINGS, TRAINED_BLOCK_SIZE, Recipe
from benchmarks.study.statistics import Result, sample

NOT_MEASURED = "-"


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose other columns are numbers."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows))


def settings_table(results: Sequence[Result], recipes: Sequence[Recipe], block_size: int) -> str:
    """Accuracy and tokens per forward of each recipe under every setting, at one block size."""
    headings = ["", "n"]
    for setting in SETTINGS:
        headings += [f"{_label(setting)}, %", "tok/fwd"]
    evaluation = f"block_{block_size}"
    rows = []
    for recipe in recipes:
        runs = [result for result in results if result["recipe"] == recipe.name]
        if not any(evaluation in run["evaluations"] for run in runs):
            continue
        row = [recipe.title, str(len(runs))]
        for setting in SETTINGS:
            row.append(_cell(results, recipe.name, accuracy(evaluation, setting), 1))
            row.append(_cell(results, recipe.name, speed(evaluation, setting), 2))
        rows.append(row)
    return markdown_table(headings, rows)


def seeds_table(results: Sequence[Result], recipes: Sequence[Recipe]) -> str:
    """Accuracy of each seed, in their order, at the block size of training."""
    evaluation = f"block_{TRAINED_BLOCK_SIZE}"
    rows = []
    for recipe in recipes:
        samples = [sample(results, recipe.name, accuracy(evaluation, name)) for name in SETTINGS]
        if samples[0] is not None and len(samples[0].values) > 1:
            values = (s.values if s else () for s in samples)
            rows.append(
                [recipe.title, *(" / ".join(f"{v:.1f}" for v in seeds) for seeds in values)]
            )
    return markdown_table(["", *map(_label, SETTINGS)], rows)


def teacher_gap_table(results: Sequence[Result], recipes: Sequence[Recipe]) -> str:
    """Points of accuracy between the teacher and each recipe, at the block size of its training."""
    teacher = sample(results, "teacher", accuracy("autoregressive", "autoregressive"))
    rows = []
    for recipe in recipes:
        evaluation = f"block_{recipe.options.get('block_size', TRAINED_BLOCK_SIZE)}"
        row = [recipe.title]
        for setting in SETTINGS:
            reached = sample(results, recipe.name, accuracy(evaluation, setting))
            row.append(
                NOT_MEASURED
                if teacher is None or reached is None
                else f"{reached.mean - teacher.mean:+.1f}"
            )
        if any(entry != NOT_MEASURED for entry in row[1:]):
            rows.append(row)
    return markdown_table(["", *map(_label, SETTINGS)], rows)


def own_block_size_table(results: Sequence[Result], recipe_of: dict[int, str]) -> str:
    """OPDLM trained and decoded with the same block size, for each size.

    Args:
        results: Of all cells.
        recipe_of: Name of the recipe that was trained with a block size.
    """
    headings = ["blocks of"]
    for setting in SETTINGS:
        headings += [f"{_label(setting)}, %", "tok/fwd"]
    rows = []
    for size in BLOCK_SIZES:
        row = [str(size)]
        for setting in SETTINGS:
            row.append(_cell(results, recipe_of[size], accuracy(f"block_{size}", setting), 1))
            row.append(_cell(results, recipe_of[size], speed(f"block_{size}", setting), 2))
        rows.append(row)
    return markdown_table(headings, rows)


def forgetting_table(results: Sequence[Result], recipes: Sequence[Recipe]) -> str | None:
    """Loss and accuracy on problems that the corpus had and had not; None without such cells."""
    losses = {"seen, loss": "loss", "unseen, loss": "validation_loss"}
    columns = {
        "seen, diffusion": ("seen", "static"),
        "unseen, diffusion": ("unseen", "static"),
        "seen, autoregressive": ("seen_autoregressive", "autoregressive"),
        "unseen, autoregressive": ("unseen_autoregressive", "autoregressive"),
    }
    rows = [
        [
            recipe.title,
            *(_cell(results, recipe.name, final_loss(name), 2) for name in losses.values()),
            *(_cell(results, recipe.name, accuracy(*key), 1) for key in columns.values()),
        ]
        for recipe in recipes
        if any(entry.name == "unseen_autoregressive" for entry in recipe.evaluations)
    ]
    trained = any(row[1] != NOT_MEASURED for row in rows)
    return markdown_table(["", *losses, *columns], rows) if trained else None


def cost_table(results: Sequence[Result], recipes: Sequence[Recipe]) -> str:
    """What training took."""

    def training(name: str) -> Quantity:
        def read(result: Result) -> float | None:
            value = result.get("training", {}).get(name)
            return None if value is None else float(value)

        return read

    def prompts(result: Result) -> float:
        specification = result["specification"]
        return float(specification.get("num_documents") or specification["num_prompts"])

    def response_tokens(result: Result) -> float | None:
        # What is read and not rolled out is counted in every pass.
        total, specification = training("response_tokens")(result), result["specification"]
        options = specification["training"]
        if total is None or "num_rollouts" in options or "num_documents" in specification:
            return total
        return total * prompts(result) / (options["train_iters"] * options["global_batch_size"])

    quantities: dict[str, tuple[Quantity, str]] = {
        "prompts or documents": (prompts, ",.0f"),
        "updates": (training("updates"), ",.0f"),
        "response tokens": (response_tokens, ",.0f"),
        "tokens trained on": (training("trained_tokens"), ",.0f"),
        "training FLOPs": (training("flops"), ".2e"),
        "seconds": (training("seconds"), ",.0f"),
    }
    # Cells of earlier versions know nothing of some of these.
    known = [result.get("training", {}) for result in results]
    for heading, name in (("tokens trained on", "trained_tokens"), ("training FLOPs", "flops")):
        if not any(name in training_ for training_ in known):
            del quantities[heading]
    rows = []
    for recipe in recipes:
        if sample(results, recipe.name, training("updates")) is None:
            continue
        row = [recipe.title]
        for quantity, form in quantities.values():
            measured = sample(results, recipe.name, quantity)
            row.append(NOT_MEASURED if measured is None else format(measured.mean, form))
        rows.append(row)
    return markdown_table(["", *quantities], rows)


def claims_table(claims: Sequence[Claim]) -> str:
    """Each claim with its numbers and verdict."""
    rows = [
        "| " + " | ".join(entries) + " |"
        for entries in (
            ("source", "claim", "measured", "verdict"),
            ("---", "---", "---", "---"),
            *(
                (claim.source, claim.statement, claim.measured, claim.verdict or "not measured")
                for claim in claims
            ),
        )
    ]
    return "\n".join(rows)


def missing_list(results: Sequence[Result], expected: dict[str, Any]) -> str | None:
    """The cells that an incomplete study lacks, or None."""
    have = {(result["recipe"], result["seed"]) for result in results}
    missing = [
        f"{recipe} seed {seed}"
        for recipe, seeds in expected.items()
        for seed in range(1, seeds + 1)
        if (recipe, seed) not in have
    ]
    return ", ".join(missing) or None


def _label(setting: str) -> str:
    return setting.replace("_", " ")


def _cell(results: Sequence[Result], recipe: str, quantity: Quantity, digits: int) -> str:
    measured = sample(results, recipe, quantity)
    return NOT_MEASURED if measured is None else format_sample(measured, digits)
