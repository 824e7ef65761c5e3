"""Records of other formats as ours: chats of ShareGPT and TRL, Alpaca, question and answer.

A record that already has `messages` or a text as `prompt` stays as it is. Of any other, the first
of these fields that is not null says what it is:

| field | format | becomes |
|---|---|---|
| `prompt`, a list | chat, as in TRL and verl | `messages` |
| `conversations` | ShareGPT: `from` and `value` | `messages` |
| `instruction` | Alpaca: with `input`, `output`, `system`, `history` | `messages` and `response` |
| `question` | question and answer | `messages` and, where `answer` is text, `response` |
"""

from collections.abc import Mapping
from typing import Any

from megatron_dlm.data.chat import json_type
from megatron_dlm.data.record_source import Record, RecordSource
from megatron_dlm.errors import UserError, bad_value

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
"""Roles of ShareGPT's speakers."""

FORMAT_FIELDS = ("messages", "prompt", "conversations", "instruction", "question")
"""Each says what format a record has."""


def standard_record(record: Record, where: str) -> Record:
    """A record in our format; one of no known format is returned as it is.

    Args:
        record: As it is stored; it is not changed.
        where: Its place, for error messages.

    Raises:
        UserError: A field of its format is malformed.
    """
    given = [name for name in FORMAT_FIELDS if record.get(name) is not None]
    if given:  # files that hold several formats write null for the fields of the others
        absent = set(FORMAT_FIELDS).difference(given)
        record = {name: value for name, value in record.items() if name not in absent}
    if "messages" in record or isinstance(record.get("prompt"), str):
        return record
    if isinstance(record.get("prompt"), list):
        rest = {name: value for name, value in record.items() if name != "prompt"}
        return {"messages": record["prompt"], **rest}
    if "prompt" in record:
        return record
    if "conversations" in record:
        return _sharegpt(record, where)
    if "instruction" in record:
        return _alpaca(record, where)
    if "question" in record:
        question = _text(record, "question", where)
        added: Record = {"messages": [{"role": "user", "content": question}]}
        if isinstance(record.get("answer"), str) and "response" not in record:
            added["response"] = record["answer"]
        rest = {name: value for name, value in record.items() if name != "question"}
        return added | rest
    return record


def _sharegpt(record: Record, where: str) -> Record:
    turns = record["conversations"]
    if not isinstance(turns, list):
        raise UserError(
            f'{where}: "conversations" is {json_type(turns)}, not a list;'
            ' write [{"from": "human", "value": "..."}]'
        )
    messages = _system(record, where)
    for i, turn in enumerate(turns):
        name = f"{where}: conversations[{i}]"
        if not isinstance(turn, dict):
            raise UserError(f'{name} is {json_type(turn)}, not an object; write "from" and "value"')
        if "role" in turn:
            messages.append(turn)
            continue
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise bad_value(
                f'{name}["from"]', speaker, "is no known speaker", f"use {', '.join(SPEAKERS)}"
            )
        messages.append({"role": SPEAKERS[speaker], "content": turn.get("value")})
    rest = {name: v for name, v in record.items() if name not in ("conversations", "system")}
    return {"messages": messages, **rest}


def _alpaca(record: Record, where: str) -> Record:
    text = _text(record, "instruction", where)
    if record.get("input") is not None and (more := _text(record, "input", where)):
        text += "\n\n" + more
    used = ("instruction", "input", "output", "system", "history")
    rest = {name: value for name, value in record.items() if name not in used}
    messages = [*_system(record, where), *_history(record, where)]
    added: Record = {"messages": [*messages, {"role": "user", "content": text}]}
    if record.get("output") is not None and "response" not in record:
        added["response"] = _text(record, "output", where)
    return added | rest


def _system(record: Record, where: str) -> list[dict[str, Any]]:
    """The message of a field `system`, if it has a text."""
    if record.get("system") is None:
        return []
    text = _text(record, "system", where)
    return [{"role": "system", "content": text}] if text else []


def _history(record: Record, where: str) -> list[dict[str, Any]]:
    """Earlier turns of Alpaca's records: pairs of what was asked and answered."""
    turns = record.get("history")
    if turns is None:
        return []
    if not isinstance(turns, list) or not all(_is_pair(turn) for turn in turns):
        raise UserError(
            f'{where}: "history" has something else than pairs of texts;'
            ' write [["question", "answer"]]'
        )
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(roles, turn, strict=True)
    ]


def _is_pair(turn: object) -> bool:
    if not isinstance(turn, list) or len(turn) != 2:
        return False
    return all(isinstance(text, str) for text in turn)


def _text(record: Record, name: str, where: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise UserError(f'{where}: "{name}" is {json_type(value)}, not a string; write the text')
    return value


def chosen_fields(record: Record, fields: Mapping[str, str], where: str) -> Record:
    """The fields that a mapping names, under its names.

    Args:
        record: As it is stored.
        fields: Path of the stored field, with dots into objects, by the name that it gets.
        where: Place of the record, for error messages.

    Raises:
        UserError: The record lacks one.
    """
    return {name: _at(record, path, where) for name, path in fields.items()}


def _at(record: Record, path: str, where: str) -> Any:
    value: Any = record
    if path in record:
        return record[path]
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise bad_value(
                f"{where}: fields", path, "is not in the record", f"it has {', '.join(record)}"
            )
        value = value[key]
    return value


def _without_response(record: Record) -> Record:
    """A record without `response`, whose chat ends before the assistant's last message."""
    record = {name: value for name, value in record.items() if name != "response"}
    messages = record.get("messages")
    if isinstance(messages, list):
        end = len(messages)
        while end and isinstance(messages[end - 1], dict) and _is_answer(messages[end - 1]):
            end -= 1
        record["messages"] = messages[:end]
    return record


def _is_answer(message: Mapping[str, Any]) -> bool:
    return message.get("role") == "assistant"


class StandardRecords(RecordSource):
    """Records in our format."""

    def __init__(
        self,
        records: RecordSource,
        fields: Mapping[str, str] | None = None,
        constants: Mapping[str, Any] | None = None,
        *,
        only_prompts: bool = False,
    ) -> None:
        """Translate when a record is asked for.

        Args:
            records: As they are stored.
            fields: The stored fields to keep, by the names that they get; None keeps all.
            constants: Fields to add, or to replace.
            only_prompts: Whether to leave out responses.
        """
        self.path = records.path
        self._records = records
        self._fields = fields
        self._constants = dict(constants or {})
        self._only_prompts = only_prompts

    @property
    def fingerprint(self) -> str:
        """Return that of the stored records."""
        return self._records.fingerprint

    def __len__(self) -> int:
        return len(self._records)

    def where(self, index: int) -> str:
        """Return the place of a record."""
        return self._records.where(index)

    def record(self, index: int) -> Record:
        """Read and translate one record."""
        record, where = self._records.record(index), self.where(index)
        if self._fields is not None:
            record = chosen_fields(record, self._fields, where)
        record = standard_record(record | self._constants, where)
        return _without_response(record) if self._only_prompts else record
