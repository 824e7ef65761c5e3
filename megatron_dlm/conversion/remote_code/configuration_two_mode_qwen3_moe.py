"""Configuration of Two-Mode-Qwen3-MoE: Qwen3-MoE, decoded by blocks or token by token."""

from typing import Any

from .configuration_diffusion import TWO_MODES
from .configuration_diffusion_moe import DiffusionMoeConfig


class TwoModeQwen3MoeConfig(DiffusionMoeConfig):
    """Fields of `DiffusionMoeConfig`."""

    model_type = "two-mode-qwen3_moe"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**TWO_MODES, **kwargs})
