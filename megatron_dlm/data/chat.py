"""Chats of records: messages, tools and variables for the chat template, all checked."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_dlm.data.exact_json import parse_json
from megatron_dlm.errors import UserError

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
TOOL_CALLS = "tool_calls"
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Keys from which chat templates read the thinking of an assistant's turn."""

OTHER_SPEECH = ("function_call", "refusal")
"""Other keys that OpenAI's format allows in place of an assistant's content."""

RESERVED_VARIABLES = frozenset(
    {
        "messages",
        "conversation",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)
"""Arguments of `apply_chat_template` itself, which are no variables of a template."""


@dataclass(frozen=True)
class Chat:
    """A conversation with the tools and variables for its chat template.

    Attributes:
        messages: At least one, each with a role; entries that are null are left out.
        tools: JSON schemas of tools that may be called; None if there are none.
        template_kwargs: Variables for the chat template; they override the run's.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def before(self, position: int) -> "Chat":
        """The same chat before a message."""
        return replace(self, messages=self.messages[:position])

    def through(self, position: int) -> "Chat":
        """The same chat up to and including a message."""
        return self.before(position + 1)


def read_chat(record: Mapping[str, Any], where: str) -> Chat:
    """The chat of a record with `messages`.

    Args:
        record: With `messages`, and maybe `tools` and `chat_template_kwargs`.
        where: ``file:line``, for error messages.

    Raises:
        UserError: Something is malformed.
    """
    kwargs = record.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise UserError(
            f'{where}: "chat_template_kwargs" is {json_type(kwargs)}, not an object;'
            ' write {"enable_thinking": false}, for example'
        )
    check_variables(kwargs, f'{where}: "chat_template_kwargs"')
    return Chat(_messages(record["messages"], where), _tools(record.get("tools"), where), kwargs)


def check_variables(names: Iterable[str], what: str) -> None:
    """Check that no variable for a chat template is an argument of `apply_chat_template`.

    Raises:
        UserError: One is; the text begins with `what`, the place it is from.
    """
    for name in names:
        if name in RESERVED_VARIABLES:
            raise UserError(f"{what} has {name!r}, which is no variable of a template; remove it")
        if name == "tools":
            raise UserError(f'{what} has "tools"; write them beside "messages" in each record')


def text_of(content: Any) -> str:
    """The text of a message's content, its parts joined; empty without content."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def written_arguments(message: Message) -> list[str]:
    """The arguments of a message's tool calls that are JSON objects written as text."""
    arguments = [_function(call).get("arguments") for call in message.get(TOOL_CALLS, ())]
    return [text for text in arguments if isinstance(text, str) and _parsed(text) is not None]


def with_parsed_arguments(message: Message) -> Message:
    """The message with the arguments that `written_arguments` returns as objects."""
    if not written_arguments(message):
        return message
    calls = []
    for call in message[TOOL_CALLS]:
        function = _function(call)
        if (arguments := _parsed(function.get("arguments"))) is not None:
            function = function | {"arguments": arguments}
        calls.append(call | {"function": function} if "function" in call else function)
    return message | {TOOL_CALLS: calls}


def _function(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    return function if isinstance(function, dict) else {}


def _parsed(arguments: object) -> dict[str, Any] | None:
    """The object that a JSON text holds; None if it holds none."""
    if not isinstance(arguments, str):
        return None
    try:
        value = parse_json(arguments.encode())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def json_type(value: object) -> str:
    """Name of a JSON value's type in error messages."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return next(name for kind, name in names.items() if isinstance(value, kind))


def _tools(tools: object, where: str) -> list[dict[str, Any]] | None:
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        found = json_type(tools) if not isinstance(tools, list) else "a list of other things"
        raise UserError(
            f'{where}: "tools" is {found}, not a list of objects; write JSON schemas of functions'
        )
    return tools


def _messages(messages: object, where: str) -> list[Message]:
    if not isinstance(messages, list):
        raise UserError(
            f'{where}: "messages" is {json_type(messages)}, not a list;'
            ' write [{"role": "user", "content": "..."}]'
        )
    if not messages:
        raise UserError(f'{where}: "messages" is empty; add a message or remove the line')
    return [_message(message, f"{where}: messages[{i}]") for i, message in enumerate(messages)]


def _message(message: object, name: str) -> Message:
    if not isinstance(message, dict):
        raise UserError(
            f"{name} is {json_type(message)}, not an object;"
            ' write {"role": "user", "content": "..."}'
        )
    role = message.get("role")
    if not isinstance(role, str):
        raise UserError(f'{name}["role"] is {_found(message, "role")}; write a string')
    if role not in ROLES:
        raise UserError(f'{name}["role"] = {role!r}: unknown role; use one of {", ".join(ROLES)}')
    calls = message.get(TOOL_CALLS)
    if calls is not None and not (
        isinstance(calls, list) and all(isinstance(call, dict) for call in calls)
    ):
        raise UserError(f'{name}["{TOOL_CALLS}"] is no list of objects; write OpenAI\'s format')
    for key in REASONING_FIELDS:
        if not isinstance(message.get(key, ""), str | None):
            raise UserError(f'{name}["{key}"] is {_found(message, key)}; write a string')
    content = message.get("content")
    if isinstance(content, list):
        _check_parts(content, name)
    elif content is None:
        says_more = any(message.get(key) for key in (TOOL_CALLS, *REASONING_FIELDS))
        if role != "assistant" or not says_more:
            raise UserError(f'{name}["content"] is {_found(message, "content")}; write a string')
    elif not isinstance(content, str):
        raise UserError(f'{name}["content"] is {_found(message, "content")}; write a string')
    # As transformers does: templates handle missing entries, but many fail at null.
    return {key: value for key, value in message.items() if value is not None}


def _check_parts(parts: list[Any], name: str) -> None:
    for i, part in enumerate(parts):
        is_text = isinstance(part, dict) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            raise UserError(
                f'{name}["content"][{i}] is no text;'
                ' write {"type": "text", "text": "..."}, a language model reads nothing else'
            )


def _found(message: Message, key: str) -> str:
    return json_type(message[key]) if key in message else "missing"
