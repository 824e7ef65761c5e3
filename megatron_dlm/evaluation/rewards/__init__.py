"""Rewards by name; a user's own by import path."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dlm.config import Config
from megatron_dlm.data.prompts import PromptDataset
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.evaluation.rewards.answers import CHOICE, EXACT_MATCH, MATH_VERIFY
from megatron_dlm.evaluation.rewards.base import RIGHT, Record, Reward
from megatron_dlm.evaluation.rewards.code import CodeReward
from megatron_dlm.evaluation.rewards.instructions import INSTRUCTIONS
from megatron_dlm.evaluation.rewards.puzzles import COUNTDOWN, SUDOKU

__all__ = ["REWARDS", "RIGHT", "Record", "Reward", "get_reward", "reward_of"]

REWARDS: dict[str, Reward] = {
    "exact_match": EXACT_MATCH,
    "math_verify": MATH_VERIFY,
    "choice": CHOICE,
    "instructions": INSTRUCTIONS,
    "code_tests": CodeReward(),
    "countdown": COUNTDOWN,
    "sudoku": SUDOKU,
}


@dataclass(frozen=True)
class OwnReward:
    """A user's function, called with a list of records and a list of responses.

    Attributes:
        path: ``package.module:function``.
        function: It returns a number from 0 to 1 for each response.
    """

    path: str
    function: Callable[[list[Record], list[str]], Sequence[Any]]

    def check(self, prompts: PromptDataset) -> None:
        """Nothing is known of what the function needs."""

    def rate(self, records: Sequence[Record], responses: Sequence[str]) -> list[float]:
        """See `Reward`.

        Raises:
            UserError: It fails, or does not return a number from 0 to 1 for each response.
        """
        try:
            rewards = self.function(list(records), list(responses))
            numbers = [float(reward) for reward in rewards]
        except Exception as error:
            raise UserError(
                f"reward = {self.path!r}: failed for {len(responses)} responses "
                f"({type(error).__name__}: {error}); return a number from 0 to 1 for each"
            ) from error
        if len(numbers) != len(responses) or not all(0 <= number <= 1 for number in numbers):
            raise UserError(
                f"reward = {self.path!r}: returned {rewards!r} for {len(responses)} responses; "
                "return a number from 0 to 1 for each"
            )
        return numbers


def reward_of(config: Config) -> Reward:
    """The reward of a run.

    Raises:
        UserError: There is no such reward.
    """
    objective = config.objective
    return get_reward(
        objective.reward, "--reward", unsafe_code_execution=objective.unsafe_code_execution
    )


def get_reward(name: str, field: str, *, unsafe_code_execution: bool = False) -> Reward:
    """A reward by its name, or a user's own by its import path.

    Args:
        name: One of `REWARDS`, or ``package.module:function``.
        field: The option that names it, for error messages.
        unsafe_code_execution: Whether `code_tests` may run code without isolation.

    Raises:
        UserError: There is no such reward.
    """
    if name == "code_tests":
        return CodeReward(unsafe=unsafe_code_execution)
    if name in REWARDS:
        return REWARDS[name]
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        known = ", ".join(REWARDS)
        raise bad_value(
            field, name, "unknown reward", f"choose {known}, or package.module:function of your own"
        )
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the module is a user's: it may fail in any way
        remedy = "name a function that can be imported, or put its folder into PYTHONPATH"
        problem = f"cannot be imported ({type(error).__name__}: {error})"
        raise bad_value(field, name, problem, remedy) from error
    if not callable(function):
        raise bad_value(field, name, "is no function", "name one")
    return OwnReward(name, function)
