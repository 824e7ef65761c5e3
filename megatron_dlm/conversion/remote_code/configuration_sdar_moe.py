"""Configuration of SDAR-MoE: the Qwen3-MoE architecture, decoded by blocks."""

from typing import Any

from .configuration_diffusion_moe import DiffusionMoeConfig


class SDARMoeConfig(DiffusionMoeConfig):
    """Fields of `DiffusionMoeConfig`."""

    model_type = "sdar_moe"

    def __init__(
        self, block_size: int = 4, attention_pattern: str = "block_causal", **kwargs: Any
    ) -> None:
        super().__init__(block_size=block_size, attention_pattern=attention_pattern, **kwargs)
