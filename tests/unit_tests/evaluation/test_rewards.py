import json
from pathlib import Path

import pytest

from megatron_dlm.data.prompts import PromptDataset, TokenTable
from megatron_dlm.data.records import RecordFile
from megatron_dlm.errors import UserError
from megatron_dlm.evaluation.rewards import REWARDS, RIGHT


@pytest.mark.parametrize(
    ("response", "answer", "exact", "by_value"),
    [
        ("3 + 4 = 7\n#### 7", "7", True, True),
        ("3 + 4 = 7\n#### 8", "7", False, False),
        ("#### 1,200", 1200, True, True),
        ("#### 1000", "1e3", True, True),
        ("#### 1e3", 1000, True, True),
        ("#### 1/2", "0.5", False, True),
        ("#### $x+1$", "1+x", False, True),
        (r"so it is \boxed{\frac{3}{4}}", "0.75", False, True),
        ("The answer is 12.", "12", False, True),
        (r"\boxed{2x}", "x^2", False, False),
        ("I do not know", "12", False, False),
        ("", "12", False, False),
        ("####", "12", False, False),
    ],
)
def test_verdicts(response: str, answer: object, exact: bool, by_value: bool) -> None:
    record = {"answer": answer}
    assert (REWARDS["exact_match"](record, response) >= RIGHT) is exact
    assert (REWARDS["math_verify"](record, response) >= RIGHT) is by_value


GSM8K = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72"
)


@pytest.mark.parametrize("name", ["exact_match", "math_verify"])
@pytest.mark.parametrize(
    ("response", "is_right"), [("#### 72", True), ("so 24\n#### 72.0", True), ("#### 24", False)]
)
def test_a_reference_may_come_with_the_way_to_it(name: str, response: str, is_right: bool) -> None:
    record = {"question": "How many clips did Natalia sell altogether?", "answer": GSM8K}
    reward = REWARDS[name]  # type: ignore[index]
    assert (reward(record, response) >= RIGHT) is is_right
    reward.check(PromptDataset(RecordFile.of([{"prompt": "?", **record}], "p.jsonl"), TokenTable()))


@pytest.mark.parametrize("name", ["exact_match", "math_verify"])
def test_a_way_without_an_answer_is_refused_at_the_start(name: str) -> None:
    record = {"prompt": "?", "answer": "48 + 24 = 72\n####"}
    prompts = PromptDataset(RecordFile.of([record], "p.jsonl"), TokenTable())
    with pytest.raises(UserError, match=r'p.jsonl:1: "answer" = .48 \+ 24'):
        REWARDS[name].check(prompts)  # type: ignore[index]


@pytest.mark.parametrize("name", ["exact_match", "math_verify"])
def test_a_prompt_without_answer_is_refused_at_the_start(name: str) -> None:
    prompts = PromptDataset(RecordFile.of([{"prompt": "2 + 2?"}], "prompts.jsonl"), TokenTable())
    with pytest.raises(UserError, match=r'prompts.jsonl:1: "answer" = None'):
        REWARDS[name].check(prompts)  # type: ignore[index]


@pytest.mark.parametrize("answer", ["x+", r"\frac{1}{", "???", "", "$"])
def test_a_reference_without_a_value_is_refused_at_the_start(tmp_path: Path, answer: str) -> None:
    path = tmp_path / "prompts.jsonl"
    records = [{"prompt": "2 + 2?", "answer": value} for value in (4, r"$\frac{1}{2}$", answer)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    prompts = PromptDataset(RecordFile.read(path, "--prompts"), TokenTable())
    with pytest.raises(UserError) as raised:
        REWARDS["math_verify"].check(prompts)
    assert str(raised.value).startswith(f'{path}:3: "answer" = {answer!r}: ')
