"""Decoding strategies, one file each: which of the drawn tokens a denoising step keeps.

A file adds its strategy with `register`; every file of this folder is loaded. Flags, rules,
evaluation settings and the modelling code of exported folders derive from the records. Nothing here
imports PyTorch, since options are checked before it is loaded: strategies use methods of tensors.
"""

import importlib
import pkgutil

from megatron_dlm.rollout.strategies.base import (
    STRATEGIES,
    Strategy,
    StrategyOption,
    register,
)
from megatron_dlm.rollout.strategies.blocks import DenoisedBlocks

__all__ = ["STRATEGIES", "DenoisedBlocks", "Strategy", "StrategyOption", "register"]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
