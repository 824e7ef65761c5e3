"""Long prompts, and suffixes and limits by domain, when prompts and examples are read."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_dlm.data.domains import Domains
from megatron_dlm.data.prompts import read_examples, read_prompts
from megatron_dlm.errors import UserError
from megatron_dlm.types.special_tokens import SpecialTokens

LENGTHS = [3, 9, 10, 11, 30, 2]
LIMIT = 10


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    digits = [str(i) * length for i, length in enumerate(LENGTHS)]
    return write(tmp_path / "p.jsonl", *({"prompt": text, "response": "5"} for text in digits))


@pytest.mark.parametrize("read", [read_prompts, read_examples])
def test_long_prompts_are_left_out(
    read: Any, path: Path, tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens
) -> None:
    data = read(path, tokenizer, special_tokens, LIMIT, long_prompts="drop")
    assert (len(data), data.num_dropped) == (4, 2)
    # What is left has its own tokens, records and lines.
    for index, expected in enumerate([0, 1, 2, 5]):
        sample = data.sample(index, index)
        ids = sample.token_ids if read is read_prompts else sample.prompt_ids
        text = str(expected) * LENGTHS[expected]
        assert tokenizer.decode(ids) == text == sample.record["prompt"]
    whole = read(path, tokenizer, special_tokens, 100, long_prompts="drop")
    assert (len(whole), whole.num_dropped) == (6, 0)
    if read is read_prompts:
        assert data.file.where(3) == f"{path}:6"
        assert data.fingerprint() != whole.fingerprint()


@pytest.mark.parametrize("read", [read_prompts, read_examples])
def test_long_prompts_keep_their_end(
    read: Any, path: Path, tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens
) -> None:
    data = read(path, tokenizer, special_tokens, LIMIT, long_prompts="truncate")
    whole = read(path, tokenizer, special_tokens, 100)
    assert (len(data), data.num_dropped) == (6, 0)
    name = "token_ids" if read is read_prompts else "prompt_ids"
    for sample, uncut in zip(data, whole, strict=True):
        ids = getattr(uncut, name).tolist()
        assert getattr(sample, name).tolist() == ids[-LIMIT:]


@pytest.mark.parametrize("read", [read_prompts, read_examples])
def test_without_the_option_or_without_any_prompt_left_they_are_refused(
    read: Any, path: Path, tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens
) -> None:
    with pytest.raises(UserError, match=r"p.jsonl:4: prompt length = 11: .*--max-prompt-length 10"):
        read(path, tokenizer, special_tokens, LIMIT)
    with pytest.raises(UserError, match=r"--max-prompt-length = 1: all prompts of .*p.jsonl"):
        read(path, tokenizer, special_tokens, 1, long_prompts="drop")


DOMAINS = Domains(
    prompt_suffix={"math": " 7", "default": ""}, max_response_length={"math": 3, "code": 9}
)


@pytest.mark.parametrize("read", [read_prompts, read_examples])
def test_suffix_and_limit_of_a_domain(
    read: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens
) -> None:
    chat = [{"role": "user", "content": "Tom has"}]
    records: list[dict[str, Any]] = [
        {"domain": "math", "messages": chat, "response": "5"},
        {"domain": "code", "messages": chat, "response": "5555"},
        {"domain": "math", "prompt": "Ann has", "response": "5"},
    ]
    path = write(tmp_path / "d.jsonl", *records)
    data = read(path, tokenizer, special_tokens, 100, domains=DOMAINS)
    texts = []
    for sample, record in zip(data, records, strict=True):
        ids = sample.token_ids if read is read_prompts else sample.prompt_ids
        texts.append(tokenizer.decode(ids))
        assert sample.record == record  # as it was
    assert "Tom has 7<|im_end|>" in texts[0]
    assert "Tom has<|im_end|>" in texts[1]
    assert texts[2] == "Ann has 7"
    if read is read_prompts:
        assert [prompt.max_response_length for prompt in data] == [3, 9, 3]
        assert data.limits_fingerprint() is not None
        assert read_prompts(path, tokenizer, special_tokens, 100).limits_fingerprint() is None
    else:
        write(path, *records, {"domain": "math", "prompt": "a", "response": "555"})
        with pytest.raises(UserError, match=r"d.jsonl:4: response length = 4: .*-by-domain 3"):
            read(path, tokenizer, special_tokens, 100, domains=DOMAINS)
    write(path, *records, {"domain": "chat", "prompt": "a", "response": "5"})
    with pytest.raises(UserError, match=r"d.jsonl:4: \"domain\" = 'chat': .*math, code"):
        read(path, tokenizer, special_tokens, 100, domains=DOMAINS)


def test_every_turn_that_is_trained_on_answers_the_suffix(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens
) -> None:
    """As it does in generation, where the turn is the next one."""
    turns = [{"role": role, "content": "1"} for role in ("user", "assistant") * 2]
    path = write(tmp_path / "d.jsonl", {"domain": "math", "messages": turns})
    data = read_examples(path, tokenizer, special_tokens, 100, domains=DOMAINS, train_on="all")
    asked = ["<|im_start|>user\n1<|im_end|>\n", "<|im_start|>user\n1 7<|im_end|>\n"]
    said = "<|im_start|>assistant\n"
    assert [tokenizer.decode(example.prompt_ids) for example in data] == [
        asked[1] + said,
        asked[0] + said + "1<|im_end|>\n" + asked[1] + said,
    ]
