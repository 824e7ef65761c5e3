"""Read and validate JSONL files of prompts and training examples, with file and line in errors."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dlm.config.groups import TrainOn
from megatron_dlm.data.chat import Chat, json_type, read_chat
from megatron_dlm.data.exact_json import UnreadableNumber, parse_json
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.regular_file import read_regular

PromptSource = str | Chat
"""Source of a prompt: plain text, or a chat that the template renders."""

_FORMAT = 'one JSON object a line, with "messages" or "prompt"'


@dataclass(frozen=True)
class RecordFile:
    """The lines of a JSONL file, kept as bytes: a parsed record takes several times the memory.

    Attributes:
        path: As the user wrote it.
        lines: The lines that are not blank.
        line_numbers: Their numbers in the file, from 1.
        fingerprint: SHA-256 of the file; a resumed run can tell that its data changed.
    """

    path: str
    lines: list[bytes]
    line_numbers: list[int]
    fingerprint: str

    @classmethod
    def read(cls, path: str | Path, field: str) -> "RecordFile":
        """Read a file.

        Args:
            path: A JSONL file; blank lines are skipped.
            field: The flag that the path came from, for error messages.

        Raises:
            UserError: The file does not exist, cannot be read or has no record.
        """
        try:
            content = read_regular(path)
        except OSError as error:
            reason = (error.strerror or type(error).__name__).lower()
            raise bad_value(
                field, str(path), f"cannot be read ({reason})", f"name a file of {_FORMAT}"
            ) from error
        numbered = [
            (number, line)
            for number, line in enumerate(content.split(b"\n"), start=1)
            if line.strip()
        ]
        if not numbered:
            raise bad_value(field, str(path), "is empty", f"write {_FORMAT}")
        return cls(
            path=str(path),
            lines=[line for _, line in numbered],
            line_numbers=[number for number, _ in numbered],
            fingerprint=hashlib.sha256(content).hexdigest(),
        )

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]], source: str) -> "RecordFile":
        """Wrap records that are in memory; `source` stands for the file in error messages.

        Raises:
            UserError: There are none, or one cannot be written as JSON.
        """
        if not records:
            raise bad_value(source, records, "is empty", "give one or more")
        lines = []
        for number, record in enumerate(records, start=1):
            try:
                lines.append(json.dumps(record).encode())
            except TypeError as error:
                problem = f"cannot be written as JSON ({error})"
                raise bad_value(f"{source}:{number}", record, problem, "repair it") from error
        content = b"\n".join(lines)
        numbers = list(range(1, len(lines) + 1))
        return cls(source, lines, numbers, hashlib.sha256(content).hexdigest())

    def select(self, indices: Sequence[int]) -> "RecordFile":
        """Return some of the records; they keep their places in error messages."""
        return replace(
            self,
            lines=[self.lines[i] for i in indices],
            line_numbers=[self.line_numbers[i] for i in indices],
        )

    def first(self, count: int) -> "RecordFile":
        """Return the first `count` records; all, if there are fewer."""
        return replace(self, lines=self.lines[:count], line_numbers=self.line_numbers[:count])

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, index: int) -> str:
        """Return ``file:line`` of a record."""
        return f"{self.path}:{self.line_numbers[index]}"

    def record(self, index: int) -> dict[str, Any]:
        """Parse one record.

        Raises:
            UserError: The line is no JSON object.
        """
        try:
            record = parse_json(self.lines[index])
        except json.JSONDecodeError as error:
            raise UserError(
                f"{self.where(index)}: broken JSON ({error.msg} at column {error.colno});"
                f" write {_FORMAT}"
            ) from error
        except UnreadableNumber as error:
            raise UserError(
                f"{self.where(index)}: the number {error} cannot be read; write it as a string"
            ) from error
        if not isinstance(record, dict):
            raise UserError(
                f"{self.where(index)}: the line is {json_type(record)}, not an object;"
                f" write {_FORMAT}"
            )
        return record

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Iterate over (``file:line``, record)."""
        for index in range(len(self)):
            yield self.where(index), self.record(index)


class ExampleSource(NamedTuple):
    """Source of a training example.

    Attributes:
        where: ``file:line`` and, of one of several, the place in `messages`.
        prompt: Text or a chat; where `response` is None, the chat ends with the answer.
        response: Text that follows the prompt; None if the template renders the answer.
    """

    where: str
    prompt: PromptSource
    response: str | None


def prompt_source(record: dict[str, Any], where: str) -> PromptSource:
    """Return the source of a record's prompt: plain text or a chat.

    Raises:
        UserError: Both or neither of `prompt` and `messages` are given, or one is malformed.
    """
    has_messages, has_prompt = "messages" in record, "prompt" in record
    if has_messages == has_prompt:
        problem = "both" if has_messages else "neither"
        raise UserError(
            f'{where}: the record has {problem} of "messages" and "prompt"; give exactly one'
        )
    if has_messages:
        return read_chat(record, where)
    prompt = record["prompt"]
    if not isinstance(prompt, str):
        raise UserError(
            f'{where}: "prompt" is {json_type(prompt)}, not a string;'
            ' write the text, or use "messages" for a chat'
        )
    if not prompt:
        raise UserError(f'{where}: "prompt" is empty; write the text or remove the line')
    for name in ("tools", "chat_template_kwargs"):
        if record.get(name):
            raise UserError(
                f'{where}: "{name}" is for the chat template, which a plain "prompt" does not use;'
                ' remove it or use "messages"'
            )
    return prompt


def open_prompt_source(record: dict[str, Any], where: str) -> PromptSource:
    """Return the source of a prompt that a model has to answer.

    Raises:
        UserError: As in `prompt_source`, or the chat already ends in an answer.
    """
    source = prompt_source(record, where)
    if isinstance(source, Chat) and source.messages[-1]["role"] == "assistant":
        raise UserError(
            f"{where}: the last of \"messages\" has role 'assistant', so nothing is left to answer;"
            " remove it or pass the file as --train-data"
        )
    return source


def example_sources(
    record: dict[str, Any], where: str, train_on: TrainOn = "last"
) -> list[ExampleSource]:
    """Return the sources of a record's training examples.

    Args:
        record: With a field `response`, or with turns of the assistant in `messages`.
        where: ``file:line`` of the record.
        train_on: ``last`` for one example, of the last answer; ``all`` for one example of every
            turn of the assistant, in order.

    Raises:
        UserError: Something is malformed, or there is no response.
    """
    given: list[ExampleSource] = []
    if "response" in record:
        source = open_prompt_source(record, where)
        if not isinstance(record["response"], str):
            raise UserError(
                f'{where}: "response" is {json_type(record["response"])}, not a string;'
                " write the text"
            )
        given.append(ExampleSource(where, source, record["response"]))
    else:
        source = prompt_source(record, where)
    turns = [] if isinstance(source, str) else _turns(source, where, train_on)
    if not turns and not given:
        raise UserError(
            f'{where}: the example has no response; add "response" or end "messages" with role'
            " 'assistant'"
        )
    return turns + given


def _turns(chat: Chat, where: str, train_on: TrainOn) -> list[ExampleSource]:
    """Sources of the assistant's turns that are trained on."""
    final = len(chat.messages) - 1
    chosen = range(final + 1) if train_on == "all" else (final,)
    turns = [i for i in chosen if chat.messages[i]["role"] == "assistant"]
    if 0 in turns:
        raise UserError(
            f"{where}: messages[0] is a response without a prompt; put a 'user' message before it"
        )
    return [
        ExampleSource(
            f"{where}: messages[{i}]" if train_on == "all" else where, chat.through(i), None
        )
        for i in turns
    ]
