"""Targets are what the chat template renders for a turn, as transformers applies it."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from megatron_dlm.data.chat_template import unread_variables
from megatron_dlm.data.prompts import read_prompts
from megatron_dlm.errors import UserError
from megatron_dlm.types.special_tokens import SpecialTokens
from tests.chat_templates import ITERATING, PARTS, PLAIN, QUOTING, THINKING
from tests.unit_tests.data.chats import (
    AGAIN,
    ANSWER,
    CALL,
    CALLED,
    CALLS,
    NO_THINKING,
    RESULT,
    SYSTEM,
    THOUGHT,
    TOOL,
    USER,
    WRITTEN,
    Message,
    read,
    texts,
    written_call,
)


@pytest.mark.parametrize(
    ("template", "record", "kwargs", "end_of_prompt", "target"),
    [
        (PLAIN, {"messages": [USER, ANSWER]}, {}, "assistant\n", "5<|im_end|>"),
        # What the prompt says of thinking is not said again, what it does not is trained.
        (THINKING, {"messages": [USER, ANSWER]}, NO_THINKING, "</think>\n\n", "5<|im_end|>"),
        (PLAIN, {"messages": [USER, ANSWER]}, NO_THINKING, "</think>\n\n", "5<|im_end|>"),
        (
            THINKING,
            {"messages": [USER, ANSWER]},
            {},
            "assistant\n",
            "<think>\n\n</think>\n\n5<|im_end|>",
        ),
        (
            THINKING,
            {"messages": [USER, THOUGHT]},
            {},
            "assistant\n",
            "<think>\n2 then 3\n</think>\n\n5<|im_end|>",
        ),
        (
            THINKING,
            {"messages": [USER, WRITTEN]},
            {},
            "assistant\n",
            "<think>\n2 then 3\n</think>\n\n5<|im_end|>",
        ),
        (
            THINKING,
            {"messages": [USER, {**ANSWER, "content": "<think>\n\n</think>\n\n5"}]},
            NO_THINKING,
            "</think>\n\n",
            "5<|im_end|>",
        ),
        # The record's variables win over the run's, both ways.
        (
            THINKING,
            {"messages": [USER, THOUGHT], "chat_template_kwargs": {"enable_thinking": True}},
            NO_THINKING,
            "assistant\n",
            "<think>\n2 then 3\n</think>\n\n5<|im_end|>",
        ),
        (
            THINKING,
            {"messages": [USER, ANSWER], "chat_template_kwargs": NO_THINKING},
            {},
            "</think>\n\n",
            "5<|im_end|>",
        ),
        # Calls, with content empty, null, missing or there.
        (THINKING, {"messages": [USER, CALLS]}, NO_THINKING, "</think>\n\n", CALLED),
        (
            THINKING,
            {"messages": [USER, {**CALLS, "content": None}]},
            NO_THINKING,
            "</think>\n\n",
            CALLED,
        ),
        (
            THINKING,
            {"messages": [USER, {"role": "assistant", "tool_calls": [CALL, CALL]}]},
            NO_THINKING,
            "</think>\n\n",
            CALLED.removesuffix("<|im_end|>") + "\n" + CALLED,
        ),
        (
            THINKING,
            {"messages": [USER, {**CALLS, "content": "Let me add."}]},
            NO_THINKING,
            "</think>\n\n",
            "Let me add.\n" + CALLED,
        ),
        (
            THINKING,
            {"messages": [USER, CALLS, RESULT, ANSWER]},
            NO_THINKING,
            "</think>\n\n",
            "5<|im_end|>",
        ),
        # Arguments of calls as text: the template's way where it reads that, else as objects.
        (
            THINKING,
            {"messages": [USER, {**CALLS, "tool_calls": [written_call('{"a":2, "b":3}')]}]},
            NO_THINKING,
            "</think>\n\n",
            CALLED.replace('{"a": 2, "b": 3}', '{"a":2, "b":3}'),
        ),
        (
            QUOTING,
            {"messages": [USER, {**CALLS, "tool_calls": [written_call('{"a":2, "b":3}')]}]},
            {},
            "assistant\n",
            '{"a": 2, "b": 3}<|im_end|>',
        ),
        (
            QUOTING,
            {"messages": [USER, {**CALLS, "tool_calls": [written_call("no JSON")]}]},
            {},
            "assistant\n",
            '"no JSON"<|im_end|>',
        ),
        (
            ITERATING,
            {"messages": [USER, {**CALLS, "tool_calls": [written_call('{"a":2}')]}]},
            {},
            "assistant\n",
            "[('a', 2)]<|im_end|>",
        ),
        # Lists of parts: the template's way where it reads them, else as text.
        (
            PARTS,
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "text", "text": "2"},
                            {"type": "text", "text": " + 3"},
                        ],
                    },
                ]
            },
            {},
            "assistant\n",
            "[2][ + 3]<|im_end|>",
        ),
        (
            THINKING,
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "text", "text": "2"},
                            {"type": "text", "text": " + 3"},
                        ],
                    },
                ]
            },
            NO_THINKING,
            "</think>\n\n",
            "2 + 3<|im_end|>",
        ),
        (
            PLAIN,
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "2 + "},
                            {"type": "text", "text": "3?"},
                        ],
                    },
                    ANSWER,
                ]
            },
            {},
            "2 + 3?<|im_end|>\n<|im_start|>assistant\n",
            "5<|im_end|>",
        ),
        # `response` is the text itself.
        (
            THINKING,
            {"messages": [USER], "response": "<think>\nso\n</think>\n\n5"},
            {},
            "assistant\n",
            "<think>\nso\n</think>\n\n5<|im_end|>",
        ),
        # A template without EOS has it appended.
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}",
            {"messages": [USER, ANSWER]},
            {},
            "assistant:",
            " 5\n<|im_end|>",
        ),
    ],
)
def test_prompt_and_target(
    tokenizer: PreTrainedTokenizerFast,
    special_tokens: SpecialTokens,
    tmp_path: Path,
    template: str,
    record: dict[str, Any],
    kwargs: dict[str, Any],
    end_of_prompt: str,
    target: str,
) -> None:
    dataset = read(tmp_path, tokenizer, special_tokens, template, record, **kwargs)
    [(prompt, response)] = texts(tokenizer, dataset)
    assert prompt.endswith(end_of_prompt)
    assert response == target
    assert dataset[0].record == record
    assert dataset[0].finish_reason == "eos"


def test_tools_reach_prompts_and_examples(
    tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens, tmp_path: Path
) -> None:
    record = {"messages": [SYSTEM, USER], "tools": [TOOL], "chat_template_kwargs": NO_THINKING}
    tokenizer.chat_template = THINKING
    ids = tokenizer.apply_chat_template(
        record["messages"], tools=[TOOL], add_generation_prompt=True, enable_thinking=False
    )["input_ids"]
    answered = record | {"messages": [SYSTEM, USER, CALLS]}
    [example] = read(tmp_path, tokenizer, special_tokens, THINKING, answered)
    assert example.prompt_ids.tolist() == ids
    assert '"description": "adds"' in tokenizer.decode(ids)
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(record))
    kwargs = {"enable_thinking": True}
    [prompt] = read_prompts(path, tokenizer, special_tokens, 1000, kwargs)
    assert prompt.token_ids.tolist() == ids


words = st.text("ab12 .\n<>", max_size=6)
calls = st.lists(
    st.fixed_dictionaries({"a": st.integers(0, 9)}).map(
        lambda arguments: {"function": {"name": "add", "arguments": arguments}}
    ),
    max_size=2,
)
said = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": words},
    optional={"reasoning_content": words | st.none(), "tool_calls": calls | st.none()},
)
asked = st.fixed_dictionaries({"role": st.just("user"), "content": words})


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    messages = [SYSTEM] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(draw(asked))
        while True:
            messages.append(draw(said))
            if not messages[-1].get("tool_calls") or draw(st.booleans()):
                break
            messages.append({"role": "tool", "content": draw(words)})
    return copy.deepcopy(messages)


@given(messages=conversations(), tools=st.sampled_from([None, [TOOL]]))
def test_every_turn_is_what_transformers_renders(
    tokenizer: PreTrainedTokenizerFast,
    special_tokens: SpecialTokens,
    tmp_path_factory: pytest.TempPathFactory,
    messages: list[Message],
    tools: list[Any] | None,
) -> None:
    record = {"messages": messages, "tools": tools}
    folder = tmp_path_factory.mktemp("chats")
    dataset = read(folder, tokenizer, special_tokens, THINKING, record, train_on="all")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(dataset) == len(turns)
    for example, turn in zip(dataset, turns, strict=True):
        prompt = tokenizer.apply_chat_template(
            messages[:turn], tools=tools, add_generation_prompt=True
        )
        assert example.prompt_ids.tolist() == prompt["input_ids"]
        # What the template marks as generated in the last turn, EOS at its end.
        whole = tokenizer.apply_chat_template(messages[: turn + 1], tools=tools, tokenize=False)
        marked = tokenizer.apply_chat_template(
            messages[: turn + 1], tools=tools, return_assistant_tokens_mask=True
        )
        start = len(prompt["input_ids"])
        prompt_text = tokenizer.decode(prompt["input_ids"])
        response = tokenizer.decode(example.response_ids)
        assert prompt_text + response == whole.removesuffix("\n")
        assert marked["assistant_masks"][start:] == [1] * (len(marked["input_ids"]) - start - 1) + [
            0
        ]
        assert marked["assistant_masks"][start - 1] == 0
    [last] = read(folder, tokenizer, special_tokens, THINKING, record)
    assert last.token_ids.tolist() == dataset[-1].token_ids.tolist()


def test_all_turns_keep_their_records(
    tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens, tmp_path: Path
) -> None:
    several = {"messages": [USER, THOUGHT, AGAIN, {**ANSWER, "content": "9"}], "id": 0}
    answered = {"messages": [USER, ANSWER, AGAIN], "response": "nine", "id": 1}
    bare = {"prompt": "1 + 1 =", "response": " 2", "id": 2}
    open_chat = {"messages": [USER, ANSWER, AGAIN], "id": 3}
    with pytest.raises(UserError, match=r":1: the example has no response"):
        read(tmp_path, tokenizer, special_tokens, THINKING, open_chat)
    [example] = read(tmp_path, tokenizer, special_tokens, THINKING, open_chat, train_on="all")
    assert tokenizer.decode(example.response_ids).endswith("5<|im_end|>")
    records = (several, answered, bare)
    dataset = read(tmp_path, tokenizer, special_tokens, THINKING, *records, train_on="all")
    assert [example.record["id"] for example in dataset] == [0, 0, 1, 1, 2]
    assert [text for _, text in texts(tokenizer, dataset)] == [
        "<think>\n2 then 3\n</think>\n\n5<|im_end|>",
        "<think>\n\n</think>\n\n9<|im_end|>",
        "<think>\n\n</think>\n\n5<|im_end|>",
        "nine<|im_end|>",
        " 2<|im_end|>",
    ]
    prompts = [text for text, _ in texts(tokenizer, dataset)]
    assert prompts[0] == prompts[2] == "<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    # Generation sees no thinking of an earlier turn.
    assert (
        prompts[1]
        == prompts[3]
        == prompts[0] + "5<|im_end|>\n" + prompts[0].replace(USER["content"], AGAIN["content"])
    )
    last = read(tmp_path, tokenizer, special_tokens, THINKING, *records)
    assert [example.record["id"] for example in last] == [0, 1, 2]
    assert [e.token_ids.tolist() for e in last] == [
        dataset[i].token_ids.tolist() for i in (1, 3, 4)
    ]


def test_variables_that_a_template_does_not_name_are_told(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    given = {"enable_thinking": False, "enable_thinkin": False}
    for template, unread in ((THINKING, ["enable_thinkin"]), ("{{ messages }}", list(given))):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template
        lines = unread_variables(tokenizer, given)
        assert lines == unread_variables(tokenizer, {"chat_template": template, **given})
        assert [line.split("variable ")[1].split(",")[0] for line in lines] == unread
