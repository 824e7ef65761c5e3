"""BIG-Bench Hard: short answers, some of them letters of choices in the question."""

import re

from megatron_dlm.evaluation.scoring import answers_match, final_answer
from megatron_dlm.evaluation.tasks.base import Record, Task, ask

_ASK = 'Think step by step, and end with a line that has "#### " and the answer only.'
_LETTER = re.compile(r"\(([A-Z])\)")


def _bbh(record: Record) -> Record:
    target = str(record["target"]).strip()
    return ask(f"{record['input'].strip()}\n{_ASK}", answer=target)


def rate(records: list[Record], responses: list[str]) -> list[float]:
    """1 where the final answer is the target, whatever its case; (A), A and "A) blue" are one."""
    return [
        float(answers_match(_plain(final_answer(response)), _plain(record["answer"]) or ""))
        for record, response in zip(records, responses, strict=True)
    ]


def _plain(answer: str | None) -> str | None:
    if answer is None:
        return None
    answer = answer.strip().strip("*`\"'").removesuffix(".").strip()
    letter = _LETTER.match(answer) or re.fullmatch(r"([A-Z])(?:[).:].*)?", answer)
    return (letter[1] if letter else answer).lower()


TASKS = (Task("bbh", f"{__name__}:rate", _bbh, "lukaemon/bbh boolean_expressions test"),)
