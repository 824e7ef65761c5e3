"""The tables of the report, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.study.claims import Claim, Quantity, accuracy, final_loss, format_sample, speed
from benchmarks.study.findings import by_seed, plateau_left
from benchmarks.study.recipes import SETTINGS, Recipe
from benchmarks.study.statistics import Result, sample

NOT_MEASURED = "-"


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """A table whose first columns, `text` of them, are text and whose other columns are numbers."""
    rule = ["---"] * text + ["---:"] * (len(headings) - text)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows))


def overview_table(
    results: Sequence[Result], recipes: Sequence[Recipe], outdated: Sequence[str]
) -> str:
    """A row for each recipe that was measured: every seed, at the block size of training.

    Args:
        results: Of all cells.
        recipes: Rows, in their order.
        outdated: Cells of an earlier version, as "recipe seed n": their rows have a dagger.
    """
    old = {name.split()[0] for name in outdated}
    rows = []
    for recipe in recipes:
        cells = [result for result in results if result["recipe"] == recipe.name]
        if not cells or recipe.documents:
            continue
        block, left_to_right = f"block_{recipe.block_size}", ("autoregressive", "autoregressive")
        quantities = [
            (accuracy(block, "static"), 1),
            (accuracy(block, "dynamic_0.9"), 1),
            (speed(block, "dynamic_0.9"), 2),
            (plateau_left, 0),
        ]
        is_converted = recipe.evaluations[0].block_size is not None
        if not is_converted:
            quantities = [(accuracy(*left_to_right), 1)]
        values = [(sample(results, recipe.name, each), digits) for each, digits in quantities]
        read = [by_seed(value, digits) if value else NOT_MEASURED for value, digits in values]
        updates = cells[0].get("training", {}).get("updates")
        rows.append(
            [
                recipe.title + (" †" if recipe.name in old else ""),
                str(recipe.block_size) if is_converted else NOT_MEASURED,
                f"{updates:,}" if updates else NOT_MEASURED,
                *read,
                *[NOT_MEASURED] * (4 - len(read)),
            ]
        )
    headings = (
        "",
        "block",
        "updates",
        "static, %",
        "dynamic 0.9, %",
        "tokens a forward",
        "plateau left at update",
    )
    return markdown_table(headings, rows)


def settings_table(results: Sequence[Result], recipes: Sequence[Recipe], block_size: int) -> str:
    """Accuracy and tokens per forward of each recipe under every setting, at one block size."""
    evaluation = f"block_{block_size}"
    columns: dict[str, tuple[Quantity, int]] = {}
    headings = ["", "n"]
    for setting in SETTINGS:
        headings += [f"{_label(setting)}, %", "tok/fwd"]
        columns[f"{setting} accuracy"] = accuracy(evaluation, setting), 1
        columns[f"{setting} speed"] = speed(evaluation, setting), 2
    rows = []
    for recipe in recipes:
        runs = [result for result in results if result["recipe"] == recipe.name]
        if any(evaluation in run["evaluations"] for run in runs):
            cells = (_cell(results, recipe, *column) for column in columns.values())
            rows.append([recipe.title, str(len(runs)), *cells])
    return markdown_table(headings, rows)


def forgetting_table(results: Sequence[Result], recipes: Sequence[Recipe]) -> str | None:
    """Loss and accuracy on problems inside and outside of the corpus; None without such cells."""
    columns: dict[str, tuple[Quantity, int]] = {
        "seen, loss": (final_loss("loss"), 2),
        "unseen, loss": (final_loss("validation_loss"), 2),
        "seen, diffusion": (accuracy("seen", "static"), 1),
        "unseen, diffusion": (accuracy("unseen", "static"), 1),
        "seen, autoregressive": (accuracy("seen_autoregressive", "autoregressive"), 1),
        "unseen, autoregressive": (accuracy("unseen_autoregressive", "autoregressive"), 1),
    }
    rows = [
        [recipe.title, *(_cell(results, recipe, *column) for column in columns.values())]
        for recipe in recipes
        if any(entry.name == "unseen_autoregressive" for entry in recipe.evaluations)
    ]
    trained = any(row[1] != NOT_MEASURED for row in rows)
    return markdown_table(["", *columns], rows) if trained else None


def cost_table(results: Sequence[Result], recipes: Sequence[Recipe]) -> str:
    """Data, updates, tokens, FLOPs and seconds of training."""

    def training(name: str) -> Quantity:
        def read(result: Result) -> float | None:
            value = result.get("training", {}).get(name)
            return None if value is None else float(value)

        return read

    def prompts(result: Result) -> float:
        specification = result["specification"]
        return float(specification.get("num_documents") or specification["num_prompts"])

    def response_tokens(result: Result) -> float | None:
        # Tokens of a data set are counted in every pass over it.
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
    headings = ("source", "claim", "measured", "verdict")
    rows = [
        (claim.source, claim.statement, claim.measured, claim.verdict or "not measured")
        for claim in claims
    ]
    return markdown_table(headings, rows, text=len(headings))


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


def _cell(results: Sequence[Result], recipe: Recipe, quantity: Quantity, digits: int) -> str:
    measured = sample(results, recipe.name, quantity)
    return NOT_MEASURED if measured is None else format_sample(measured, digits)
