"""The files of problems that the study trains and evaluates on.

Problems of the `unseen` kind multiply, those of the `seen` kind only add and subtract. The teacher
solves both. The corpus has only the seen kind, so pretraining on it may forget the other.
"""

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from benchmarks.study.recipes import Recipe
from megatron_dlm.data.arithmetic import examples
from megatron_dlm.output_file import replaced_file

PROMPTS_SEED, HELDOUT_SEED = 2, 3


def multiplies(example: dict[str, Any]) -> bool:
    """Whether a problem contains a multiplication."""
    return " * " in example["response"]


HELDOUT: dict[str, Callable[[dict[str, Any]], bool]] = {
    "heldout": lambda example: True,
    "seen": lambda example: not multiplies(example),
    "unseen": multiplies,
}
"""Files of held-out problems: name, and whether a problem belongs into it."""


def heldout_path(folder: Path, name: str) -> Path:
    """Path of a file of held-out problems."""
    return folder / f"{name}.jsonl"


def training_data(folder: Path, recipe: Recipe) -> dict[str, Path]:
    """The data options of a recipe, with their values.

    Pretraining also has a held-out corpus, of the unseen kind.
    """
    if recipe.documents:
        return {
            "data_path": folder / f"corpus_{recipe.corpus}_{recipe.documents}",
            "valid_data_path": folder / "corpus_unseen",
        }
    option = "train_data" if recipe.objective == "next_token" else "prompts"
    return {option: folder / f"prompts_{recipe.num_prompts}.jsonl"}


def write_problems(folder: Path, num_heldout: int, trained: Iterable[Recipe]) -> None:
    """Write all files of held-out problems, and the training data of the recipes.

    Prompts are the beginning of one sequence, so that a longer run begins with the prompts of a
    shorter one.
    """
    from benchmarks.study.corpus import write_corpus

    folder.mkdir(parents=True, exist_ok=True)

    def heldout(name: str) -> Iterable[dict[str, Any]]:
        return islice(filter(HELDOUT[name], examples("heldout", HELDOUT_SEED)), num_heldout)

    for name in HELDOUT:
        write_jsonl(heldout_path(folder, name), heldout(name))
    done = set[Path]()
    for recipe in trained:
        data = training_data(folder, recipe)
        if done.issuperset(data.values()):
            continue
        done.update(data.values())
        problems = examples("train", PROMPTS_SEED)
        if recipe.documents:
            kind = filter(HELDOUT[recipe.corpus], problems)
            write_corpus(data["data_path"], islice(kind, recipe.documents))
            write_corpus(data["valid_data_path"], heldout("unseen"))
        else:
            [path] = data.values()
            write_jsonl(path, islice(problems, recipe.num_prompts))


def write_jsonl(path: Path, problems: Iterable[dict[str, Any]]) -> None:
    """Write one object a line."""
    with replaced_file(path) as temporary, temporary.open("wb") as file:
        for problem in problems:
            file.write(orjson.dumps(problem) + b"\n")
