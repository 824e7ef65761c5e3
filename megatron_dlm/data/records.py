"""The meaning of a record: the prompt that it has, and the examples to train on."""

from typing import Any, NamedTuple

from megatron_dlm.config.groups import DataConfig, TrainOn
from megatron_dlm.data.chat import Chat, json_type, read_chat
from megatron_dlm.errors import UserError

PromptSource = str | Chat
"""Source of a prompt: plain text, or a chat that the template renders."""


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
    record: dict[str, Any], where: str, train_on: TrainOn = DataConfig.train_on
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
