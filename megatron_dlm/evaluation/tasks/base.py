"""What a task is: from the records of a benchmark's own file to prompts that a reward can rate.

Prompts are chats, to which the model's chat template applies (OPDLM, appendix B.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dlm.errors import UserError

Record = dict[str, Any]
"""JSON object of a line."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

REASON = r"Please reason step by step, and put your final answer within \boxed{}."
"""Appended to problems of mathematics (OPDLM, appendix B.2)."""

CHOOSE = (
    'Please show your choice in the answer field with only the choice letter, e.g., "answer": "C".'
)
"""Appended to questions with choices (the same)."""


@dataclass(frozen=True)
class Task:
    """A benchmark, or a user's own set of prompts.

    Attributes:
        name: Its name on the command line.
        reward: What rates a response: a name of `REWARDS`, or ``package.module:function``.
        convert: From a record of the published file to one with `messages` and what the reward
            reads; None for prompts as they are. `LookupError`, `TypeError` and `ValueError` mean
            that the record is none of this benchmark's.
        source: Where the data are published: name at Hugging Face, with configuration and split.
    """

    name: str
    reward: str
    convert: Callable[[Record], Record] | None = None
    source: str = ""

    def prompts(self, records: Sequence[tuple[str, Record]]) -> list[Record]:
        """Convert the records of a file, given with their places.

        Raises:
            UserError: One is none of this benchmark's.
        """
        if self.convert is None:
            return [record for _, record in records]
        converted = []
        for where, record in records:
            try:
                converted.append(self.convert(record))
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise UserError(
                    f"{where}: is no record of task {self.name!r} "
                    f"({type(error).__name__}: {error}); its fields are {list(record)}: name the "
                    f"file of {self.source or 'the benchmark'}, or choose another task"
                ) from error
        return converted


def ask(text: str, **fields: Any) -> Record:
    """A record of one message, with the fields that the reward reads."""
    return {"messages": [{"role": "user", "content": text}], **fields}


def text_of(record: Mapping[str, Any], *names: str) -> str:
    """The first of several fields that is there, as text.

    Raises:
        LookupError: None is there.
    """
    for name in names:
        if record.get(name) not in (None, ""):
            return str(record[name])
    raise LookupError(f"no field {' or '.join(names)}")
