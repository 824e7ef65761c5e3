"""Many mathematical answers are rated by several processes, with the same rewards."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest

from megatron_dlm.evaluation.math_processes import FEWEST, rate_answers
from megatron_dlm.evaluation.rewards import REWARDS

ANSWERS = {
    "#### 12": True,
    "The answer is $\\frac{24}{2}$.": True,
    "\\boxed{12.0}": True,
    "\\boxed{13} \N{GREEK SMALL LETTER PI}": False,
    "": False,
}
REFERENCE = "12"


@pytest.mark.slow
def test_processes_have_the_rewards_of_one() -> None:
    answers = [list(ANSWERS)[i % len(ANSWERS)] for i in range(2 * FEWEST + 1)]
    expected = [float(ANSWERS[answer]) for answer in answers]
    pairs = [(answer, REFERENCE) for answer in answers]
    run = subprocess.run
    sizes: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        sizes.append(options["input"].count(f'"{REFERENCE}"]'))
        return run(*arguments, **options)

    with mock.patch("subprocess.run", counted):
        assert rate_answers(pairs, processes=1) == expected
        assert sizes == []
        assert rate_answers(pairs, processes=8) == expected
        assert sorted(sizes) == [FEWEST, FEWEST + 1]
        # Limits of time are signals, which another thread of this process cannot have.
        with ThreadPoolExecutor(1) as pool:
            reward = REWARDS["math_verify"]
            thinking = [f"<think>#### 7</think>{answer}" for answer in answers[:3]]
            rated = pool.submit(reward.rate, [{"answer": REFERENCE}] * 3, thinking)
            assert rated.result() == expected[:3]
        assert len(sizes) == 3


def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="rating answers ended with 1"):
        rate_answers([("#### 1", "1")] * (2 * FEWEST), processes=2)
