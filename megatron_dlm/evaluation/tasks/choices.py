"""MMLU and its relatives, GPQA, C-Eval, ARC and RACE: questions with lettered choices."""

import hashlib
import random
from collections.abc import Sequence

from megatron_dlm.evaluation.tasks.base import CHOOSE, LETTERS, Record, Task, ask, text_of


def _question(text: str, options: Sequence[str], answer: int | str) -> Record:
    """A question; `answer` is a letter or an index."""
    if not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"{len(options)} choices")
    letters = LETTERS[: len(options)]
    letter = letters[answer] if isinstance(answer, int) else answer.strip().upper()
    if letter not in letters or (isinstance(answer, int) and answer < 0):
        raise ValueError(f"answer {answer!r} of {len(options)} choices")
    lines = [f"{name}. {option}" for name, option in zip(letters, options, strict=True)]
    return ask("\n".join([text.strip(), *lines, CHOOSE]), answer=letter)


def _mmlu(record: Record) -> Record:
    """With `choices`, or with a column for each letter."""
    options = record.get("choices") or [record[letter] for letter in "ABCD"]
    answer = record["answer"]
    if isinstance(answer, str) and answer.isdigit():
        answer = int(answer)
    return _question(record["question"], options, answer)


def _mmlu_pro(record: Record) -> Record:
    return _question(record["question"], record["options"], record["answer"])


def _mmlu_redux(record: Record) -> Record:
    """With the annotators' answer, where they corrected it."""
    corrected = record.get("correct_answer")
    if record.get("error_type", "ok") == "wrong_groundtruth" and corrected not in (None, ""):
        text = str(corrected).strip()
        answer: int | str = int(text) if text.isdigit() else text
    else:
        answer = int(record["answer"])
    return _question(record["question"], record["choices"], answer)


def _gpqa(record: Record) -> Record:
    """The right answer comes first in the file; choices are in an order drawn from the question."""
    text = record["Question"]
    right = text_of(record, "Correct Answer").strip()
    options = [right, *(text_of(record, f"Incorrect Answer {n}").strip() for n in (1, 2, 3))]
    order = list(range(4))
    seed = hashlib.sha256(text.encode()).digest()
    random.Random(seed).shuffle(order)
    return _question(text, [options[place] for place in order], order.index(0))


def _ceval(record: Record) -> Record:
    return _question(record["question"], [record[letter] for letter in "ABCD"], record["answer"])


def _arc(record: Record) -> Record:
    """Labels of the file are letters or numbers."""
    choices = record["choices"]
    place = list(choices["label"]).index(record["answerKey"])
    return _question(record["question"], list(choices["text"]), place)


def _race(record: Record) -> Record:
    text = f"{record['article'].strip()}\n\n{record['question']}"
    return _question(text, record["options"], record["answer"])


TASKS = (
    Task("mmlu", "choice", _mmlu, "cais/mmlu all test"),
    Task("mmlu_pro", "choice", _mmlu_pro, "TIGER-Lab/MMLU-Pro test"),
    Task("mmlu_redux", "choice", _mmlu_redux, "edinburgh-dawg/mmlu-redux-2.0 anatomy test"),
    Task("gpqa_diamond", "choice", _gpqa, "Idavidrein/gpqa gpqa_diamond train"),
    Task("ceval", "choice", _ceval, "ceval/ceval-exam computer_network val"),
    Task("arc", "choice", _arc, "allenai/ai2_arc ARC-Challenge test"),
    Task("race", "choice", _race, "ehovy/race high test"),
)
