"""What a reward is: the interface between responses and what is true of them.

A reward is computed on one process of a model replica, which hands it to the others, so it may be
slow and need not be deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_dlm.data.prompts import PromptDataset
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.extras import check_installed

RIGHT = 1.0
"""Least reward of a right response."""

Record = Mapping[str, Any]
"""The JSON object of a prompt, with the fields that a reward reads."""


class Reward(Protocol):
    """Rates responses to the prompts of a run."""

    def check(self, prompts: PromptDataset) -> None:
        """Check that responses to every prompt can be rated, before anything is generated.

        Raises:
            UserError: They cannot; names file and line.
        """

    def rate(self, records: Sequence[Record], responses: Sequence[str]) -> list[float]:
        """The rewards of responses, from 0 (wrong) to 1 (right), in their order.

        Args:
            records: Of the prompts.
            responses: Texts without special tokens.
        """


@dataclass(frozen=True)
class RuleReward:
    """A reward that looks at one response at a time.

    Attributes:
        rate_one: From a record and a response to the reward.
        check_record: Raises `UserError` for a record that no response could be rated by.
        package: Package of an extra that it imports; None for none.
        name: For the error of a missing package.
    """

    name: str
    rate_one: Callable[[Record, str], float]
    check_record: Callable[[Record, str], None]
    package: str | None = None

    def check(self, prompts: PromptDataset) -> None:
        """See `Reward`."""
        if self.package is not None:
            check_installed(self.package, "reward", self.name)
        for where, record in prompts.file.records():
            self.check_record(record, where)

    def rate(self, records: Sequence[Record], responses: Sequence[str]) -> list[float]:
        """See `Reward`."""
        return [
            float(self.rate_one(record, without_thinking(response)))
            for record, response in zip(records, responses, strict=True)
        ]


def without_thinking(response: str) -> str:
    """What follows the thoughts of a response; nothing, where they have no end."""
    start, end = response.find("<think>"), response.rfind("</think>")
    if end >= 0:
        return response[end + len("</think>") :].lstrip()
    return response if start < 0 else response[:start]


def field_of(record: Record, name: str, kind: type, where: str, what: str) -> Any:
    """A field that a reward needs.

    Raises:
        UserError: It is missing or of another kind.
    """
    value = record.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise bad_value(f'{where}: "{name}"', value, f"is not {what}", "add it, or repair it")
    return value


def unrated(where: str, problem: str) -> UserError:
    """The error for a record that no response could be rated by."""
    return UserError(f"{where}: {problem}; repair the record or choose another reward")
