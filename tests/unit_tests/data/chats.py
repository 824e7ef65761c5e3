"""Chats, and how the tests of chat templates read them."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from megatron_dlm.config.groups import TrainOn
from megatron_dlm.data.prompts import ExampleDataset, read_examples
from megatron_dlm.types.special_tokens import SpecialTokens

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
