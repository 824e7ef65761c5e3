"""The registry of rules, and the stages in which they are checked."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

C = TypeVar("C", bound=Callable[..., None])

Subject = Literal["training", "teacher", "inference"]
"""Subject of a rule: a model that is trained, its teacher, or one that is only loaded (to generate
or to be converted)."""


class Stage(enum.Enum):
    """Stages of checking, in this order, and the input of their rules."""

    VALUES = enum.auto()
    """Each value for itself: the configuration."""

    NEEDS = enum.auto()
    """Required options of the objective: the configuration."""

    USAGE = enum.auto()
    """Unused options: the configuration. Later stages look only at used ones."""

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
        subjects: Models that it applies to.
    """

    check: Callable[..., None]
    stage: Stage
    subjects: tuple[Subject, ...]


RULES: list[Rule] = []
"""Every rule; those of a stage are checked in this order: by the names of their files, then as they
stand there."""


def rule(stage: Stage, *subjects: Subject) -> Callable[[C], C]:
    """Register a function as a rule, by default of training only."""

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
