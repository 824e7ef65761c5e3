"""Configuration of SDAR-MoE: the Qwen3-MoE architecture, decoded by blocks."""

from typing import Any

from .configuration_diffusion import BY_BLOCKS
from .configuration_diffusion_moe import DiffusionMoeConfig


class SDARMoeConfig(DiffusionMoeConfig):
    """Fields of `DiffusionMoeConfig`."""

    model_type = "sdar_moe"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**BY_BLOCKS, **kwargs})
