"""Rewards of responses, as numbers: the interface between generation and verification.

A reward is computed on one process of a model replica, which hands it to the others, so it may be
slow and need not be deterministic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_dlm.config.groups import RewardName
from megatron_dlm.data.prompts import PromptDataset
from megatron_dlm.evaluation.tasks import TASKS, Task

RIGHT = 1.0
"""Least reward of a right response."""


class Reward(Protocol):
    """Scores responses to the prompts of a run."""

    def check(self, prompts: PromptDataset) -> None:
        """Check that responses to every prompt can be scored, before anything is generated.

        Raises:
            UserError: They cannot; names file and line.
        """

    def __call__(self, record: Mapping[str, Any], response: str) -> float:
        """The reward of a response, from 0 (wrong) to 1 (right).

        Args:
            record: The JSON object of the prompt.
            response: Text without special tokens.
        """


@dataclass(frozen=True)
class AnswerReward:
    """1 if the answer matches by an evaluation task, else 0."""

    task: Task

    def check(self, prompts: PromptDataset) -> None:
        """See `Reward`."""
        self.task.check(prompts)

    def __call__(self, record: Mapping[str, Any], response: str) -> float:
        """See `Reward`."""
        reference = self.task.reference(record, "a prompt")
        return float(self.task.matches(self.task.extract(response), reference))


REWARDS: dict[RewardName, Reward] = {
    "exact_match": AnswerReward(TASKS["exact_match"]),
    "math_verify": AnswerReward(TASKS["math_verify"]),
}
