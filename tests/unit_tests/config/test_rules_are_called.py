"""A rule that is written is also called: `validate` forgets no `check_*` function."""

import functools
import inspect
from types import ModuleType

import pytest

from megatron_dlm.config import (
    architecture_rules,
    layout_rules,
    objective_rules,
    self_distillation_rules,
    usage_rules,
    validate,
    validate_architecture,
    value_rules,
)
from tests.unit_tests.config.configurations import OPDLM, architecture, config_with

MODULES = (
    architecture_rules,
    layout_rules,
    objective_rules,
    self_distillation_rules,
    usage_rules,
    value_rules,
)


def rules(module: ModuleType) -> list[str]:
    """Names of the rules that a module defines."""
    functions = inspect.getmembers(module, inspect.isfunction)
    return [
        name
        for name, function in functions
        if name.startswith("check_") and function.__module__ == module.__name__
    ]


def test_every_rule_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    written: list[str] = []
    for module in MODULES:
        for name in rules(module):
            place = f"{module.__name__}.{name}"
            written.append(place)
            record = functools.partial(lambda place, *given: called.append(place), place)
            monkeypatch.setattr(module, name, record)
    config = config_with(OPDLM)
    validate(config, 1)
    validate_architecture(config, architecture(), architecture())
    assert len(written) > 30
    assert set(called) == set(written)
