"""Configuration of SDAR: the Qwen3 architecture, decoded by blocks."""

from typing import Any

from .configuration_diffusion import DiffusionConfig


class SDARConfig(DiffusionConfig):
    """Fields of `DiffusionConfig`."""

    model_type = "sdar"

    def __init__(
        self, block_size: int = 4, attention_pattern: str = "block_causal", **kwargs: Any
    ) -> None:
        super().__init__(block_size=block_size, attention_pattern=attention_pattern, **kwargs)
