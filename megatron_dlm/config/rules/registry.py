"""Where rules make themselves known, and when each is checked."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

C = TypeVar("C", bound=Callable[..., None])

Subject = Literal["training", "teacher", "inference"]
"""What a rule holds for: a model that is trained, one that is run beside it, and one that is only
loaded (to generate, to be converted)."""


class Stage(enum.Enum):
    """When rules are checked, in this order, and what they are given."""

    VALUES = enum.auto()
    """Each value for itself: the configuration."""

    NEEDS = enum.auto()
    """What the objective cannot do without: the configuration."""

    USAGE = enum.auto()
    """What the run has no use for: the configuration. Later stages look at what is used only."""

    COMBINATIONS = enum.auto()
    """Values that do not go together: the configuration."""

    LAYOUT = enum.auto()
    """The number of processes: the configuration and that number."""

    LENGTH = enum.auto()
    """The length of the run, checked again when the data have been read: the configuration."""

    MODELS = enum.auto()
    """The models of a run together: the configuration and the sizes of each."""

    ARCHITECTURE = enum.auto()
    """One model: the configuration and its sizes."""


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        check: Raises `UserError` if the rule is broken.
        stage: When it is checked.
        subjects: What it holds for.
    """

    check: Callable[..., None]
    stage: Stage
    subjects: tuple[Subject, ...]


RULES: list[Rule] = []
"""Every rule; those of a stage are checked in this order: by the names of their files, then as they
stand there."""


def rule(stage: Stage, *subjects: Subject) -> Callable[[C], C]:
    """Make a function a rule, of training alone if nothing else is named."""

    def register(check: C) -> C:
        RULES.append(Rule(check, stage, subjects or ("training",)))
        return check

    return register


def check_rules(subject: Subject, stage: Stage, *given: Any) -> None:
    """Check the rules of a stage that hold for a subject.

    Raises:
        UserError: The first rule that is broken, with the values that would work.
    """
    for known in RULES:
        if known.stage is stage and subject in known.subjects:
            known.check(*given)
