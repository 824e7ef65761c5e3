"""Rules across the options of a configuration: one function a rule, in the file of its subject.

Every file of this folder is loaded, and a function with `@rule` is checked: nothing else has to be
written. `megatron_dlm.config.validation` checks them.
"""

import importlib
import pkgutil

from megatron_dlm.config.rules.registry import RULES, Rule, Stage, Subject, rule

__all__ = ["RULES", "Rule", "Stage", "Subject", "rule"]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
