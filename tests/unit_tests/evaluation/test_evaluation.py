"""Answers are compared as numbers, and rates are sums divided once."""

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from megatron_dlm.data.prompts import read_prompts
from megatron_dlm.data.tokenizer import resolve_special_tokens
from megatron_dlm.data.tokenizer_builder import build_tokenizer
from megatron_dlm.errors import UserError
from megatron_dlm.evaluation.evaluator import Response, evaluate
from megatron_dlm.evaluation.rewards import REWARDS
from megatron_dlm.evaluation.scoring import answers_match, final_answer
from megatron_dlm.evaluation.tasks import get_task
from megatron_dlm.types.trajectory import Trajectory

REWARD = REWARDS["exact_match"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7 + 5 = 12\n#### 12", "12"),
        ("#### 3\n#### 4", "4"),
        ("#### 12\nand more", "12"),
        ("####12 ", "12"),
        ("#### ", None),
        ("####\n12", None),
        ("12", None),
        ("", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("predicted", "expected", "same"),
    [
        ("12", "12", True),
        ("12", "1", False),
        ("1,200", "1200.0", True),
        ("$5", "5", True),
        ("-3", "3", False),
        ("12 eggs", "12", False),
        ("NaN", "NaN", True),
        ("blue", "blue", True),
        ("blue", "12", False),
        (None, "12", False),
    ],
)
def test_answers_match(predicted: str | None, expected: str, same: bool) -> None:
    assert answers_match(predicted, expected) is same


def trajectory(tokenizer: PreTrainedTokenizerFast, response: str, answer: object) -> Trajectory:
    ids = torch.tensor(tokenizer(response)["input_ids"])
    return Trajectory(
        sample_index=0,
        prompt_ids=torch.tensor([1, 2]),
        response_ids=ids,
        unmask_step=torch.ones_like(ids),
        finish_reason="eos" if response.endswith("<|im_end|>") else "length",
        denoising_forwards=4,
        total_forwards=5,
        record={"answer": answer},
    )


def test_evaluate(tokenizer: PreTrainedTokenizerFast) -> None:
    trajectories = [
        trajectory(tokenizer, "7 + 5 = 12\n#### 12<|im_end|>", "12"),  # 14 tokens
        trajectory(tokenizer, "#### 1<|im_end|>", "12"),  # 4 tokens
        trajectory(tokenizer, "#### 12", 12),  # 4 tokens, cut at the length limit
        trajectory(tokenizer, "7 +", "7"),  # 2 tokens, no answer
    ]
    for i, drafted, accepted in ((1, 3, 2), (2, 1, 1)):
        drafts = dict(drafted_tokens=drafted, accepted_tokens=accepted)
        trajectories[i] = dataclasses.replace(trajectories[i], **drafts)
    result = evaluate(trajectories, tokenizer, REWARD)
    assert [len(t.response_ids) for t in trajectories] == [14, 4, 4, 2]
    assert result.to_json() == {
        "accuracy": 0.5,
        "correct": 2,
        "total": 4,
        "mean_reward": 0.5,
        "tokens_per_forward": 24 / 16,
        "tokens_per_total_forward": 24 / 20,
        "mean_response_length": 6.0,
        "eos_rate": 0.5,
        "acceptance_rate": 0.75,
    }
    json.dumps(result.to_json())


def test_a_response_keeps_what_its_rates_need(tokenizer: PreTrainedTokenizerFast) -> None:
    kept = Response.of(trajectory(tokenizer, "#### 3<|im_end|>", 4), tokenizer)
    assert kept.to_json() == {
        "sample_index": 0,
        "text": "#### 3",
        "tokens": 4,
        "denoising_forwards": 4,
        "total_forwards": 5,
        "finish_reason": "eos",
        "drafted_tokens": 0,
        "accepted_tokens": 0,
    }
    assert Response(**json.loads(json.dumps(kept.to_json()))) == kept


def test_tail_tokens_do_not_count(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = trajectory(tokenizer, "#### 1<|im_end|>", "1")
    with_tail = replace(plain, tail_ids=torch.tensor([5, 6]), tail_unmask_step=torch.ones(2))
    assert evaluate([with_tail], tokenizer, REWARD) == evaluate([plain], tokenizer, REWARD)


def test_speed_is_unknown_without_forwards(tokenizer: PreTrainedTokenizerFast) -> None:
    reference = replace(
        trajectory(tokenizer, "#### 1", "1"), denoising_forwards=0, total_forwards=0
    )
    assert evaluate([reference], tokenizer, REWARD).tokens_per_forward is None


def test_nothing_to_evaluate(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="no response"):
        evaluate([], tokenizer, REWARD)


@pytest.mark.parametrize("record", [{}, {"answer": None}, {"answer": True}, {"answer": [1]}])
def test_records_without_reference_are_named(
    record: dict[str, object], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    lines: list[dict[str, object]] = [{"answer": 1.5}, {"answer": "x"}, record]
    path.write_text("\n".join(json.dumps({"prompt": "a", **line}) for line in lines))
    special_tokens = resolve_special_tokens(tokenizer, {"vocab_size": 512}, "x")
    prompts = read_prompts(path, tokenizer, special_tokens, 10)
    with pytest.raises(UserError, match=rf'^{re.escape(str(path))}:3: "answer" = '):
        REWARD.check(prompts)


def test_unknown_task() -> None:
    with pytest.raises(
        UserError, match=r"^--task = 'sing': unknown task; choose one of aime_2024, "
    ):
        get_task("sing")
