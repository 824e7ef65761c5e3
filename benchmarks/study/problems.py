"""The files of problems that the study trains and evaluates on.

Problems of the `unseen` kind multiply, those of the `seen` kind only add and subtract. The teacher
solves both. The corpus is of the seen kind alone, which shows what pretraining on it forgets.
"""

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from benchmarks.study.recipes import Recipe
from megatron_dlm.data.arithmetic import examples

PROMPTS_SEED, HELDOUT_SEED = 2, 3


def multiplies(example: dict[str, Any]) -> bool:
    """Whether a problem contains a multiplication."""
    return " * " in example["response"]


HELDOUT: dict[str, Callable[[dict[str, Any]], bool]] = {
    "heldout": lambda example: True,
    "seen": lambda example: not multiplies(example),
    "unseen": multiplies,
}
"""Files of held-out problems: name, and which problems belong into it."""


def heldout_path(folder: Path, name: str) -> Path:
    """Where `write_problems` puts a file of held-out problems."""
    return folder / f"{name}.jsonl"


def training_data(folder: Path, recipe: Recipe) -> tuple[str, Path]:
    """The option that names what a recipe trains on, and its value."""
    if recipe.documents:
        return "data_path", folder / f"corpus_{recipe.documents}"
    return "prompts", folder / f"prompts_{recipe.num_prompts}.jsonl"


def write_problems(folder: Path, num_heldout: int, trained: Iterable[Recipe]) -> None:
    """Write all files of held-out problems, and what the recipes train on.

    Prompts are the beginning of one sequence whatever their number, so that a longer run begins
    with the prompts of a shorter one.
    """
    from benchmarks.study.corpus import write_corpus

    folder.mkdir(parents=True, exist_ok=True)
    for name, belongs in HELDOUT.items():
        problems = filter(belongs, examples("heldout", HELDOUT_SEED))
        write_jsonl(heldout_path(folder, name), islice(problems, num_heldout))
    for path, recipe in {training_data(folder, recipe)[1]: recipe for recipe in trained}.items():
        if recipe.documents:
            write_corpus(path, recipe.documents)
        else:
            write_jsonl(path, islice(examples("train", PROMPTS_SEED), recipe.num_prompts))


def write_jsonl(path: Path, problems: Iterable[dict[str, Any]]) -> None:
    """Write one object a line."""
    with path.open("wb") as file:
        for problem in problems:
            file.write(orjson.dumps(problem) + b"\n")
