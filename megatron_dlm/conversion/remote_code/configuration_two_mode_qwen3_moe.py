"""Configuration of Two-Mode-Qwen3-MoE: Qwen3-MoE, decoded by blocks or token by token."""

from typing import Any

from .configuration_diffusion_moe import DiffusionMoeConfig


class TwoModeQwen3MoeConfig(DiffusionMoeConfig):
    """Fields of `DiffusionMoeConfig`."""

    model_type = "two-mode-qwen3_moe"

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
