"""Render chats as text: the prompt that generation sees, and the target that it should write.

The prompt is the chat before a turn, rendered with the generation prompt; the target is what the
template renders after it when the turn is included. Content of a record that the template leaves
out is an error: it would silently be missing in training.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from megatron_dlm.data.chat import (
    OTHER_SPEECH,
    REASONING_FIELDS,
    TOOL_CALLS,
    Chat,
    Message,
    check_variables,
    text_of,
    with_parsed_arguments,
    written_arguments,
)
from megatron_dlm.data.template_limits import BYTES, template_limits
from megatron_dlm.data.tokenizer import require_chat_template
from megatron_dlm.errors import UserError

_LAST_BLOCK = re.compile(r"<(\w+)>(\s*</\1>)?\s*\Z")
"""A block such as ``<think>`` at the end of a prompt: open, or closed and empty."""

_SHOWN = 40  # characters of a text in an error message


class ChatTemplate:
    """Renders chats with a tokenizer's template.

    Args:
        tokenizer: Has the template.
        template_kwargs: The run's variables for it; a record's override them.

    Raises:
        UserError: One of them is not a variable of a template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
    ) -> None:
        check_variables(template_kwargs, "--chat-template-kwargs")
        self._tokenizer = tokenizer
        self._template_kwargs = template_kwargs

    def prompt(self, chat: Chat, where: str) -> str:
        """The chat with the generation prompt.

        Raises:
            UserError: The template refuses the chat or leaves out some of it; names `where`.
        """
        chat = self._with_readable_calls(self._with_readable_parts(chat, where), where)
        prompt = self._render(chat, where, add_generation_prompt=True)
        self._check_prompt(chat, prompt, where)
        return prompt

    def example(self, chat: Chat, where: str) -> tuple[str, str]:
        """The prompt before the chat's last message, and the rendered text of that message.

        Raises:
            UserError: As for `prompt`, or the rendered message does not continue its prompt, so
                that generation could never write it.
        """
        chat = self._with_readable_calls(self._with_readable_parts(chat, where), where)
        context = chat.before(len(chat.messages) - 1)
        prompt = self._render(context, where, add_generation_prompt=True)
        self._check_prompt(context, prompt, where)
        whole = self._render(chat, where)
        target = _continuation(prompt, whole)
        if target is None:
            differs = (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b)
            same = next(differs, min(len(prompt), len(whole)))
            raise UserError(
                f"{where}: where the prompt goes on with {_shown(prompt[same:])}, the chat template"
                f" has the answer as {_shown(whole[same:])}, which generation can never write;"
                ' remove its thinking, set "chat_template_kwargs" to allow it, or write as'
                ' "response" what follows the prompt'
            )
        check_one_block(prompt, target, where)
        _check_thought_once(chat.messages[-1], target, where)
        self._check_target(chat, whole, target, where)
        return prompt, target

    def _render(self, chat: Chat, where: str, *, add_generation_prompt: bool = False) -> str:
        require_chat_template(self._tokenizer, where)
        given = {**self._template_kwargs, **chat.template_kwargs}
        if chat.tools is not None:
            given["tools"] = chat.tools
        try:
            with template_limits():
                return str(
                    self._tokenizer.apply_chat_template(
                        chat.messages,
                        add_generation_prompt=add_generation_prompt,
                        tokenize=False,
                        **given,
                    )
                )
        except MemoryError as error:
            raise UserError(
                f"{where}: the chat template takes more than {BYTES >> 30} GiB for one chat;"
                " repair the template"
            ) from error
        except Exception as error:  # Templates are programs: any exception is possible.
            reason = str(error) or "no reason given"
            if not isinstance(error, jinja2.TemplateError):
                reason = f"{type(error).__name__}: {reason}"
            raise UserError(
                f'{where}: the chat template refuses "messages" ({reason});'
                " change them, or the template"
            ) from error

    def _renders(self, chat: Chat, text: str, where: str, **options: bool) -> bool:
        """Whether a chat renders as this text."""
        try:
            return self._render(chat, where, **options) == text
        except UserError:
            return False

    def _with_readable_parts(self, chat: Chat, where: str) -> Chat:
        """The chat with lists of parts as text, where the template cannot read lists.

        Templates that expect text print a list as Python or JSON would, leave it out or fail.
        """
        joined: list[Message] = []
        marked: list[Message] = []
        parts: list[dict[str, Any]] = []
        for message in chat.messages:
            content = message.get("content")
            if isinstance(content, list):
                joined.append(message | {"content": text_of(content)})
                own = [
                    part | {"text": f"text-of-part-{len(parts) + i}."}
                    for i, part in enumerate(content)
                ]
                marked.append(message | {"content": own})
                parts += own
            else:
                joined.append(message)
                marked.append(message)
        if not parts:
            return replace(chat, messages=joined)
        try:
            text = self._render(replace(chat, messages=marked), where)
        except UserError:
            return replace(chat, messages=joined)
        printed = (f for part in parts for f in (str(part), json.dumps(part, ensure_ascii=False)))
        reads = all(part["text"] in text for part in parts) and not any(f in text for f in printed)
        return chat if reads else replace(chat, messages=joined)

    def _with_readable_calls(self, chat: Chat, where: str) -> Chat:
        """The chat with arguments of calls as objects, where the template cannot read JSON in text.

        OpenAI's format has them as text; templates that expect objects quote that again or fail.
        """
        written = [text for message in chat.messages for text in written_arguments(message)]
        if not written:
            return chat
        parsed = replace(chat, messages=[with_parsed_arguments(m) for m in chat.messages])
        try:
            rendered = self._render(chat, where)
        except UserError:
            return parsed
        quoted = any(json.dumps(text, ensure_ascii=False) in rendered for text in written)
        return parsed if quoted else chat

    def _check_prompt(self, chat: Chat, prompt: str, where: str) -> None:
        """Check that the prompt has the tools, their calls and all messages but the assistant's.

        The assistant's earlier messages may be shortened: templates leave out old thinking.
        """

        def same_without(messages: list[Message], tools: list[dict[str, Any]] | None) -> bool:
            less = replace(chat, messages=messages, tools=tools)
            return self._renders(less, prompt, where, add_generation_prompt=True)

        messages = chat.messages
        if chat.tools is not None and same_without(messages, None):
            raise _not_rendered(where, '"tools"')
        for name in (TOOL_CALLS, *OTHER_SPEECH):
            if any(message.get(name) for message in messages):
                silent = [_without(message, name) for message in messages]
                if same_without(silent, chat.tools):
                    raise _not_rendered(where, f'"{name}"')
        # Results of tools are short, and may be in the prompt for another reason.
        unseen = {
            message["role"]
            for message in messages
            if (said := text_of(message.get("content")).strip())
            and (
                message["role"] == "tool" or (message["role"] != "assistant" and said not in prompt)
            )
        }
        for role in sorted(unseen):
            silent = [m | {"content": ""} if m["role"] == role else m for m in messages]
            if same_without(silent, chat.tools):
                raise _not_rendered(where, f"the content of role {role!r}")

    def _check_target(self, chat: Chat, whole: str, target: str, where: str) -> None:
        """Check that the target contains everything in the turn."""
        *context, turn = chat.messages
        others = ((name,) for name in OTHER_SPEECH)
        for names in (("content",), (TOOL_CALLS,), REASONING_FIELDS, *others):
            given = [name for name in names if _is_said(turn.get(name))]
            said = text_of(turn.get("content")).strip()
            if not given or (names == ("content",) and said in target):
                continue
            less = _without(turn, *given) | ({"content": ""} if "content" in given else {})
            if self._renders(replace(chat, messages=[*context, less]), whole, where):
                raise _not_rendered(where, f'messages[{len(context)}]["{given[0]}"]')


def unread_variables(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> list[str]:
    """Warnings of variables that the chat template does not name: they change nothing."""
    template = str(template_kwargs.get("chat_template", tokenizer.chat_template))
    return [
        f"--chat-template-kwargs: the chat template names no variable {name}, so it changes nothing"
        for name in template_kwargs
        if name != "chat_template" and re.search(rf"\b{re.escape(name)}\b", template) is None
    ]


def _is_said(value: object) -> bool:
    return bool(value.strip() if isinstance(value, str) else value)


def _without(message: Message, *names: str) -> Message:
    return {name: value for name, value in message.items() if name not in names}


def check_one_block(prompt: str, response: str, where: str) -> None:
    """Check that a response does not open a thinking block again that its prompt opens or closes.

    Raises:
        UserError: It does.
    """
    block = _LAST_BLOCK.search(prompt)
    if block is None:
        return
    tag, is_closed = f"<{block[1]}>", block[2] is not None
    opens_again = response.lstrip().startswith(tag)
    if opens_again or (is_closed and tag in response and f"</{block[1]}>" in response):
        verb = "closes" if is_closed else "opens"
        raise UserError(
            f"{where}: the chat template {verb} {tag} in the prompt, and the response has another;"
            ' remove its thinking, or set "chat_template_kwargs" to allow it'
        )


def _check_thought_once(turn: Message, target: str, where: str) -> None:
    """Check that thinking is not given both in a field of its own and in the content."""
    thoughts = [str(turn[key]).strip() for key in REASONING_FIELDS if turn.get(key)]
    tag = re.match(r"\s*<\w+>", text_of(turn.get("content")))
    if tag is None or not thoughts:
        return
    opening = tag[0].strip()
    written = any(re.search(rf"{opening}\s*{re.escape(thought)}", target) for thought in thoughts)
    if written and target.count(opening) > 1:
        raise UserError(
            f"{where}: the answer has its thinking twice, in a field of its own and as {opening} in"
            ' "content"; keep one of them'
        )


def _continuation(prompt: str, whole: str) -> str | None:
    """The part of a rendered chat after the prompt; None if it does not begin with the prompt."""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    block = _LAST_BLOCK.search(prompt)
    # Some templates close thinking in the prompt and render answers without it: they do follow.
    if block is not None and block[2] is not None:
        header = prompt[: block.start()]
        if whole.startswith(header):
            return whole[len(header) :]
    return None


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def _not_rendered(where: str, what: str) -> UserError:
    return UserError(
        f"{where}: the chat template leaves out {what}; remove it, or use one that renders it"
    )
