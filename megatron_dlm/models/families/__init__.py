"""Model families, one file each: what varies between models that Megatron's layers can be.

A file makes its family known with `register`; every file of this folder is loaded.
"""

import importlib
import pkgutil

from megatron_dlm.models.families.base import (
    FAMILIES,
    ModelFamily,
    ModelType,
    model_types,
    register,
)

__all__ = ["FAMILIES", "ModelFamily", "ModelType", "model_types", "register"]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
