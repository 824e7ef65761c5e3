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


@pytest.mark.parametrize("name", ["exact_match", "math_verify"])
def test_a_prompt_without_answer_is_refused_at_the_start(name: str) -> None:
    prompts = PromptDataset(RecordFile.of({"prompt": "2 + 2?"}, "prompts.jsonl"), TokenTable())
    with pytest.raises(UserError, match=r'prompts.jsonl:1: "answer" = None'):
        REWARDS[name].check(prompts)  # type: ignore[index]
