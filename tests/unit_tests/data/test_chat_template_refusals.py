"""Content that a chat template does not render is refused, with file and line."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_dlm.errors import UserError
from megatron_dlm.types.special_tokens import SpecialTokens
from tests.chat_templates import ALWAYS_THINKING, PLAIN, THINKING
from tests.unit_tests.data.chats import (
    AGAIN,
    ANSWER,
    CALLS,
    NO_THINKING,
    OLD_CALL,
    REFUSAL,
    RESULT,
    THOUGHT,
    TOOL,
    USER,
    WRITTEN,
    read,
)


@pytest.mark.parametrize(
    ("template", "record", "kwargs", "problem"),
    [
        # Thinking after a prompt that closes it, or that opens it already.
        (THINKING, {"messages": [USER, THOUGHT]}, NO_THINKING, "closes <think> in the prompt"),
        (THINKING, {"messages": [USER, WRITTEN]}, NO_THINKING, "closes <think> in the prompt"),
        (PLAIN, {"messages": [USER, WRITTEN]}, NO_THINKING, "closes <think> in the prompt"),
        (
            PLAIN,
            {"messages": [USER, {**ANSWER, "content": "So: <think>2</think> 5"}]},
            NO_THINKING,
            "closes <think> in the prompt",
        ),
        (
            THINKING,
            {"messages": [USER], "response": "<think>\nso\n</think>\n\n5"},
            NO_THINKING,
            "closes <think> in the prompt",
        ),
        (
            ALWAYS_THINKING,
            {"messages": [USER], "response": "<think>\nso\n</think>\n\n5"},
            {},
            "opens <think> in the prompt",
        ),
        (ALWAYS_THINKING, {"messages": [USER, WRITTEN]}, {}, "generation can never write"),
        (
            THINKING,
            {"messages": [USER, THOUGHT | WRITTEN]},
            {},
            "has its thinking twice",
        ),
        # What the template leaves out.
        (PLAIN, {"messages": [USER, CALLS]}, {}, 'leaves out messages[1]["tool_calls"]'),
        (PLAIN, {"messages": [USER, THOUGHT]}, {}, 'leaves out messages[1]["reasoning_content"]'),
        (THINKING, {"messages": [USER, OLD_CALL]}, {}, 'leaves out messages[1]["function_call"]'),
        (PLAIN, {"messages": [USER, REFUSAL]}, {}, 'leaves out messages[1]["refusal"]'),
        (PLAIN, {"messages": [USER, OLD_CALL, AGAIN, ANSWER]}, {}, 'leaves out "function_call"'),
        (PLAIN, {"messages": [USER, ANSWER], "tools": [TOOL]}, {}, 'leaves out "tools"'),
        (
            PLAIN,
            {"messages": [USER, CALLS, RESULT, ANSWER]},
            {},
            'leaves out "tool_calls"',
        ),
        (
            "{% for m in messages if m.role != 'tool' %}{{ m.content }}|{% endfor %}",
            {"messages": [USER, ANSWER, RESULT, ANSWER]},
            {},
            "leaves out the content of role 'tool'",
        ),
        (
            "{% for m in messages %}{{ m.content if loop.first }}|{% endfor %}",
            {"messages": [USER, {**ANSWER, "content": "seven"}]},
            {},
            'leaves out messages[1]["content"]',
        ),
        # EOS ends a response.
        (PLAIN, {"messages": [USER, {**ANSWER, "content": "5<|im_end|>6"}]}, {}, "goes on after"),
        # Malformed.
        (
            PLAIN,
            {"messages": [USER, {"role": "assistant", "content": None}]},
            {},
            '"content"] is null',
        ),
        (
            PLAIN,
            {"messages": [USER, {"role": "assistant", "tool_calls": []}]},
            {},
            '"content"] is missing',
        ),
        (PLAIN, {"messages": [{**USER, "content": None}, ANSWER]}, {}, '"content"] is null'),
        (
            PLAIN,
            {"messages": [{**USER, "content": [{"type": "image", "url": "x"}]}, ANSWER]},
            {},
            'messages[0]["content"][0] is no text',
        ),
        (
            PLAIN,
            {"messages": [USER, {**CALLS, "tool_calls": "add"}]},
            {},
            '"tool_calls"] is no list',
        ),
        (PLAIN, {"messages": [USER, {**ANSWER, "reasoning": 3}]}, {}, '"reasoning"] is a number'),
        (PLAIN, {"messages": [USER, ANSWER], "tools": "add"}, {}, '"tools" is a string'),
        (PLAIN, {"messages": [USER, ANSWER], "tools": ["add"]}, {}, '"tools" is a list of other'),
        (
            PLAIN,
            {"messages": [USER, ANSWER], "chat_template_kwargs": [1]},
            {},
            '"chat_template_kwargs" is a list',
        ),
        (
            PLAIN,
            {"messages": [USER, ANSWER], "chat_template_kwargs": {"tokenize": True}},
            {},
            "has 'tokenize', which is no variable",
        ),
        (
            PLAIN,
            {"messages": [USER, ANSWER], "chat_template_kwargs": {"tools": [TOOL]}},
            {},
            'has "tools"; write them beside "messages"',
        ),
        (PLAIN, {"prompt": "a", "response": "b", "tools": [TOOL]}, {}, '"tools" is for the chat'),
        # Templates fail with whatever Python has.
        ("{{ 1 + messages[0].content }}", {"messages": [USER, ANSWER]}, {}, "TypeError"),
        ("{{ messages[7].content }}", {"messages": [USER, ANSWER]}, {}, "has no element 7"),
        ("{{ {}.pop('x') }}", {"messages": [USER, ANSWER]}, {}, "refuses"),
        ("{{ 1 / 0 }}", {"messages": [USER, ANSWER]}, {}, "ZeroDivisionError"),
        ("{{ 'x'.split('') }}", {"messages": [USER, ANSWER]}, {}, "ValueError"),
        ("{{ strftime_now(3) }}", {"messages": [USER, ANSWER]}, {}, "refuses"),
        ("{% if %}", {"messages": [USER, ANSWER]}, {}, "refuses"),
        ("{{ raise_exception('no\nway') }}", {"messages": [USER, ANSWER]}, {}, "(no way)"),
    ],
)
def test_what_cannot_be_rendered_is_named(
    tokenizer: PreTrainedTokenizerFast,
    special_tokens: SpecialTokens,
    tmp_path: Path,
    template: str,
    record: dict[str, Any],
    kwargs: dict[str, Any],
    problem: str,
) -> None:
    with pytest.raises(UserError) as error:
        read(
            tmp_path,
            tokenizer,
            special_tokens,
            template,
            {"prompt": "a", "response": "b"},
            record,
            **kwargs,
        )
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/t.jsonl:2: ")
    assert problem in message
    assert "; " in message, "no remedy"
    assert "\n" not in message


def test_errors_name_the_turn(
    tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens, tmp_path: Path
) -> None:
    chat = [USER, {**ANSWER, "content": "5<|MASK|>"}, AGAIN, ANSWER]
    for train_on, where in (("all", "t.jsonl:1: messages[1]: "), ("last", "t.jsonl:1: ")):
        with pytest.raises(UserError, match=r"contains the MASK token") as error:
            read(tmp_path, tokenizer, special_tokens, PLAIN, {"messages": chat}, train_on=train_on)
        assert str(error.value).startswith(f"{tmp_path}/{where}the ")
    with pytest.raises(UserError, match=r":1: messages\[0\] is a response without a prompt"):
        read(
            tmp_path,
            tokenizer,
            special_tokens,
            PLAIN,
            {"messages": [ANSWER, *chat]},
            train_on="all",
        )


def test_variables_of_the_run_are_checked(
    tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"--chat-template-kwargs has 'padding'"):
        read(tmp_path, tokenizer, special_tokens, PLAIN, {"messages": [USER, ANSWER]}, padding=True)
