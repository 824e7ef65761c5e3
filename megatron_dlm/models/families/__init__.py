"""Model families, one file each: the differences between models built from Megatron's layers.

A file adds its family with `register`; every file of this folder is loaded.
"""

import importlib
import pkgutil

from megatron_dlm.models.families.base import (
    FAMILIES,
    ModelFamily,
    ModelType,
    exported_as,
    model_types,
    register,
)

__all__ = ["FAMILIES", "ModelFamily", "ModelType", "exported_as", "model_types", "register"]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
