"""The files of problems that the study trains and evaluates on.

Problems of the `unseen` kind multiply, those of the `seen` kind only add and subtract. The teacher
solves both; a corpus of the seen kind alone shows what further training forgets of the other.
"""

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

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


def prompts_path(folder: Path, num_prompts: int) -> Path:
    """Where `write_problems` puts prompts to train on."""
    return folder / f"prompts_{num_prompts}.jsonl"


def write_problems(folder: Path, num_heldout: int, nums_prompts: Iterable[int]) -> None:
    """Write all files of held-out problems, and a file of prompts for each wanted number.

    Every number of prompts is the beginning of one sequence, so that a longer run begins with the
    prompts of a shorter one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, belongs in HELDOUT.items():
        problems = filter(belongs, examples("heldout", HELDOUT_SEED))
        _write(heldout_path(folder, name), islice(problems, num_heldout))
    for num in nums_prompts:
        _write(prompts_path(folder, num), islice(examples("train", PROMPTS_SEED), num))


def _write(path: Path, problems: Iterable[dict[str, Any]]) -> None:
    with path.open("wb") as file:
        for problem in problems:
            file.write(orjson.dumps(problem) + b"\n")
