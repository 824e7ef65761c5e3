"""Targets are what the chat template renders for a turn, as transformers applies it."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from megatron_dlm.config.groups import TrainOn
from megatron_dlm.data.prompts import ExampleDataset, read_examples, read_prompts
from megatron_dlm.data.tokenizer_builder import build_tokenizer
from megatron_dlm.errors import UserError
from megatron_dlm.types.special_tokens import SpecialTokens
from tests.chat_templates import ALWAYS_THINKING, ITERATING, PARTS, PLAIN, QUOTING, THINKING

Message = dict[str, Any]

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "2 + 3?"}
AGAIN = {"role": "user", "content": "and 4?"}
ANSWER = {"role": "assistant", "content": "5"}
THOUGHT = {"role": "assistant", "content": "5", "reasoning_content": "2 then 3"}
WRITTEN = {"role": "assistant", "content": "<think>\n2 then 3\n</think>\n\n5"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
OLD_CALL = {"role": "assistant", "content": "", "function_call": CALL["function"]}
REFUSAL = {"role": "assistant", "content": "", "refusal": "I cannot."}
RESULT = {"role": "tool", "content": "5", "tool_call_id": None}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds"}}
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>'


def written_call(arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "add", "arguments": arguments}}


NO_THINKING = {"enable_thinking": False}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One for the tests of this file, which set its template."""
    return build_tokenizer()


def read(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    special_tokens: SpecialTokens,
    template: str,
    *records: dict[str, Any],
    train_on: TrainOn = "last",
    **kwargs: Any,
) -> ExampleDataset:
    tokenizer.chat_template = template
    path = folder / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return read_examples(
        path, tokenizer, special_tokens, 1000, chat_template_kwargs=kwargs, train_on=train_on
    )


def texts(tokenizer: PreTrainedTokenizerFast, dataset: ExampleDataset) -> list[tuple[str, str]]:
    return [
        (tokenizer.decode(example.prompt_ids), tokenizer.decode(example.response_ids))
        for example in dataset
    ]


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


@pytest.mark.parametrize(
    ("template", "record", "kwargs", "problem"),
    [
        # Thinking behind a prompt that closes it, or that opens it already.
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
        (ALWAYS_THINKING, {"messages": [USER, WRITTEN]}, {}, "generation cannot come to"),
        (
            THINKING,
            {"messages": [USER, THOUGHT | WRITTEN]},
            {},
            "is thought twice",
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
            "leaves out what role 'tool' says",
        ),
        (
            "{% for m in messages %}{{ m.content if loop.first }}|{% endfor %}",
            {"messages": [USER, {**ANSWER, "content": "seven"}]},
            {},
            'leaves out messages[1]["content"]',
        ),
        # EOS ends a response.
        (PLAIN, {"messages": [USER, {**ANSWER, "content": "5<|im_end|>6"}]}, {}, "goes on behind"),
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
