"""Records of other formats as ours: chats of ShareGPT and TRL, Alpaca, question and answer.

A record that already has `messages` or a text as `prompt` stays as it is. Of any other, the first
of these fields says what it is:

| field | format | becomes |
|---|---|---|
| `prompt`, a list | chat, as in TRL and verl | `messages` |
| `conversations` | ShareGPT: `from` and `value` | `messages` |
| `instruction` | Alpaca: with `input` and `output` | `messages` and `response` |
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


def standard_record(record: Record, where: str) -> Record:
    """A record in our format; one of no known format is returned as it is.

    Args:
        record: As it is stored; it is not changed.
        where: Its place, for error messages.

    Raises:
        UserError: A field of its format is malformed.
    """
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
    messages = []
    if isinstance(record.get("system"), str) and record["system"]:
        messages.append({"role": "system", "content": record["system"]})
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
    if record.get("input"):
        text += "\n\n" + _text(record, "input", where)
    used = ("instruction", "input", "output")
    rest = {name: value for name, value in record.items() if name not in used}
    added: Record = {"messages": [{"role": "user", "content": text}]}
    if "output" in record and "response" not in record:
        added["response"] = _text(record, "output", where)
    return added | rest


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
