"""Prompt and example files: ids are the template's, and every bad line is named."""

import dataclasses
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_dlm.data.arithmetic import examples
from megatron_dlm.data.prompts import read_examples, read_prompts
from megatron_dlm.data.tokenizer_builder import build_tokenizer
from megatron_dlm.errors import UserError
from megatron_dlm.types.special_tokens import SpecialTokens

USER = {"role": "user", "content": "Tom has 2 eggs."}
ASSISTANT = {"role": "assistant", "content": "2 + 3 = 5"}
GOOD = json.dumps({"messages": [USER]})


def write(path: Path, *lines: str | dict[str, Any]) -> Path:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def test_prompt_ids_are_the_templates(
    tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens, tmp_path: Path
) -> None:
    records = list(islice(examples("train", 1), 30))
    prompts = read_prompts(write(tmp_path / "x", *records), tokenizer, special_tokens, 100)
    assert len(prompts) == 30
    for index, (prompt, record) in enumerate(zip(prompts, records, strict=True)):
        ids = tokenizer.apply_chat_template(record["messages"], add_generation_prompt=True)
        assert prompt.token_ids.tolist() == ids["input_ids"]
        assert prompt.sample_index == index
        assert prompt.record == record, "optional fields are kept"
    assert prompts.sample(4, sample_index=1000).sample_index == 1000
    assert prompts[-1].record == records[-1]


def test_chats_and_texts_mix(
    tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens, tmp_path: Path
) -> None:
    path = write(tmp_path / "x", {"prompt": "Tom has"}, "", GOOD, {"prompt": "Ann has", "id": 7})
    prompts = read_prompts(path, tokenizer, special_tokens, 100)
    texts = [tokenizer.decode(p.token_ids) for p in prompts]
    chat = "<|im_start|>user\nTom has 2 eggs.<|im_end|>\n<|im_start|>assistant\n"
    assert texts == ["Tom has", chat, "Ann has"]
    assert prompts[2].record["id"] == 7


def test_chat_template_kwargs(
    tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens, tmp_path: Path
) -> None:
    path = write(tmp_path / "x", GOOD)
    template = "{{ messages[0].content }}{% if enable_thinking %} think{% endif %}"
    for kwargs, text in [({}, ""), ({"enable_thinking": True}, " think")]:
        prompts = read_prompts(
            path, tokenizer, special_tokens, 100, {"chat_template": template, **kwargs}
        )
        assert tokenizer.decode(prompts[0].token_ids) == USER["content"] + text


BAD_PROMPTS = [
    ("{not json", "broken JSON"),
    ('"text"', "a string, not an object"),
    ("[1]", "a list, not an object"),
    ({"id": 1}, 'neither of "messages" and "prompt"'),
    ({"prompt": "a", "messages": [USER]}, 'both of "messages" and "prompt"'),
    ({"prompt": 3}, '"prompt" is a number'),
    ({"prompt": None}, '"prompt" is null'),
    ({"prompt": ""}, '"prompt" is empty'),
    ({"messages": "hi"}, '"messages" is a string'),
    ({"messages": []}, '"messages" is empty'),
    ({"messages": ["hi"]}, "messages[0] is a string"),
    ({"messages": [{"content": "x"}]}, 'messages[0]["role"] is missing'),
    ({"messages": [USER, {"role": "user"}]}, 'messages[1]["content"] is missing'),
    ({"messages": [{"role": "user", "content": 3}]}, 'messages[0]["content"] is a number'),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0][\"role\"] = 'robot'"),
    ({"messages": [USER, ASSISTANT]}, "nothing is left to answer"),
    ({"prompt": "Tom <|MASK|>"}, "contains the MASK token (id 511)"),
    ({"prompt": "1" * 101}, "prompt length = 101: is over --max-prompt-length 100; shorten"),
]


@pytest.mark.parametrize(("line", "words"), BAD_PROMPTS)
def test_bad_prompt_is_named(
    line: str | dict[str, Any],
    words: str,
    tokenizer: PreTrainedTokenizerFast,
    special_tokens: SpecialTokens,
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "p.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(UserError) as error:
        read_prompts(path, tokenizer, special_tokens, 100)
    message = str(error.value)
    assert message.startswith(f"{path}:3: ")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(("content", "words"), [(None, "no such file"), ("", "is empty")])
@pytest.mark.parametrize("field", ["--prompts", "--train-data"])
def test_bad_file_is_named(
    content: str | None,
    words: str,
    field: str,
    tokenizer: PreTrainedTokenizerFast,
    special_tokens: SpecialTokens,
    tmp_path: Path,
) -> None:
    path = tmp_path / "p.jsonl"
    if content is not None:
        write(path, content)
    read = read_prompts if field == "--prompts" else read_examples
    with pytest.raises(UserError) as error:
        read(path, tokenizer, special_tokens, 100)
    assert str(error.value).startswith(f"{field} = {str(path)!r}: ")
    assert words in str(error.value)


def test_chat_template_that_refuses(
    tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens, tmp_path: Path
) -> None:
    path = write(tmp_path / "p", GOOD)
    template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match=r"p:1: the chat template refuses .*\(no system role\)"):
        read_prompts(path, tokenizer, special_tokens, 100, {"chat_template": template})


def test_no_chat_template(special_tokens: SpecialTokens, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"p:1: .* no chat template"):
        read_prompts(write(tmp_path / "p", GOOD), tokenizer, special_tokens, 100)
    assert len(read_prompts(write(tmp_path / "q", {"prompt": "a"}), tokenizer, special_tokens, 9))


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER], "response": ASSISTANT["content"]},
        {"messages": [USER, ASSISTANT]},
        {"messages": [USER], "response": ASSISTANT["content"] + "<|im_end|>"},
    ],
)
def test_example_forms_agree(
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    special_tokens: SpecialTokens,
    tmp_path: Path,
) -> None:
    dataset = read_examples(write(tmp_path / "x", record), tokenizer, special_tokens, 100)
    (example,) = dataset[:]
    whole = tokenizer.apply_chat_template([USER, ASSISTANT], tokenize=False)
    assert tokenizer.decode(example.token_ids) == whole.removesuffix("\n")
    assert example.response_ids[-1] == special_tokens.eos_token_id
    assert (example.response_ids == special_tokens.eos_token_id).sum() == 1
    assert example.unmask_step.tolist() == [0] * len(example.response_ids)
    assert example.finish_reason == "eos"
    assert example.record == record
    assert dataset.sample(0, sample_index=99).sample_index == 99


def test_any_listed_end_is_the_end_of_an_example(
    tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens, tmp_path: Path
) -> None:
    special_tokens = dataclasses.replace(special_tokens, eos_token_ids=(508,))
    lines = [{"prompt": "a", "response": f"x{end}"} for end in ("", "<|im_end|>", "<|endoftext|>")]
    for end, example in zip(
        (510, 510, 508),
        read_examples(write(tmp_path / "x", *lines), tokenizer, special_tokens, 100),
        strict=True,
    ):
        assert example.response_ids.tolist() == [*tokenizer.encode("x"), end]
        assert example.finish_reason == "eos"
    path = write(tmp_path / "y", {"prompt": "a", "response": "x<|endoftext|>y"})
    with pytest.raises(UserError, match=r"y:1: .*after the EOS token \(id 508\)"):
        read_examples(path, tokenizer, special_tokens, 100)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": [USER]}, "no response"),
        ({"prompt": "a"}, "no response"),
        ({"prompt": "a", "response": 3}, '"response" is a number'),
        ({"messages": [USER, ASSISTANT], "response": "x"}, "nothing is left to answer"),
        ({"messages": [ASSISTANT]}, "messages[0] is a response without a prompt"),
        ({"prompt": "a", "response": "x<|im_end|>y"}, "goes on after the EOS token"),
        ({"prompt": "a", "response": "x<|MASK|>"}, "the response contains the MASK"),
        ({"prompt": "a", "response": "1" * 20}, "response length = 21: is over --max-response"),
        ({"prompt": "1" * 31, "response": "x"}, "prompt length = 31: is over --max-prompt"),
    ],
)
def test_bad_example_is_named(
    record: dict[str, Any],
    words: str,
    tokenizer: PreTrainedTokenizerFast,
    special_tokens: SpecialTokens,
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "t.jsonl", {"prompt": "a", "response": "b"}, record)
    with pytest.raises(UserError) as error:
        read_examples(path, tokenizer, special_tokens, 30, max_response_length=20)
    assert str(error.value).startswith(f"{path}:2: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_example_longer_than_the_model_is_refused(
    tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens, tmp_path: Path
) -> None:
    lines = [{"prompt": "1" * prompt, "response": "1" * 9} for prompt in (20, 21)]
    path = write(tmp_path / "x", *lines)  # 30 and 31 tokens with EOS
    limit = {"max_position_embeddings": 31}
    assert len(read_examples(path, tokenizer, special_tokens, 100, **limit)) == 2
    with pytest.raises(UserError, match=r"x:2: length of prompt and response = 31: .* 30 pos"):
        read_examples(path, tokenizer, special_tokens, 100, max_position_embeddings=30)


def test_many_records_keep_their_order(
    tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens, tmp_path: Path
) -> None:
    """More records than are tokenised at once, in both prompt forms."""
    records = [
        {"prompt": f"{i}"} if i % 3 else {"messages": [{"role": "user", "content": f"{i}"}]}
        for i in range(2500)
    ]
    prompts = read_prompts(write(tmp_path / "x", *records), tokenizer, special_tokens, 100)
    for i, prompt in enumerate(prompts):
        text = tokenizer.decode(prompt.token_ids).removeprefix("<|im_start|>user\n")
        assert text.split("<")[0] == str(i)


def test_fingerprint_follows_the_content(
    tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens, tmp_path: Path
) -> None:
    def fingerprint(name: str, line: str) -> str:
        path = write(tmp_path / name, line)
        return read_prompts(path, tokenizer, special_tokens, 100).file.fingerprint

    assert fingerprint("a", GOOD) == fingerprint("b", GOOD)
    assert fingerprint("a", GOOD) != fingerprint("b", GOOD + "\n" + GOOD)
