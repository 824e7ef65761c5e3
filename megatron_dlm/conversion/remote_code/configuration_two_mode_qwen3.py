"""Configuration of Two-Mode-Qwen3: the Qwen3 architecture, decoded by blocks or token by token."""

from typing import Any

from .configuration_diffusion import TWO_MODES, DiffusionConfig


class TwoModeQwen3Config(DiffusionConfig):
    """Fields of `DiffusionConfig`."""

    model_type = "two-mode-qwen3"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**TWO_MODES, **kwargs})
