"""Configuration of Two-Mode-Qwen3: the Qwen3 architecture, decoded by blocks or token by token."""

from typing import Any

from .configuration_diffusion import DiffusionConfig


class TwoModeQwen3Config(DiffusionConfig):
    """Fields of `DiffusionConfig`."""

    model_type = "two-mode-qwen3"

    def __init__(
        self,
        block_size: int = 4,
        attention_pattern: str = "block_causal",
        context_attention: str = "causal",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            block_size=block_size,
            attention_pattern=attention_pattern,
            context_attention=context_attention,
            **kwargs,
        )
