"""Configuration of SDAR: the Qwen3 architecture, decoded by blocks."""

from typing import Any

from .configuration_diffusion import BY_BLOCKS, DiffusionConfig


class SDARConfig(DiffusionConfig):
    """Fields of `DiffusionConfig`."""

    model_type = "sdar"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**BY_BLOCKS, **kwargs})
