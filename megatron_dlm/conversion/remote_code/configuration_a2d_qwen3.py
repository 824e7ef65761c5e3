"""Configuration of A2D-Qwen3: the Qwen3 architecture with bidirectional attention."""

from typing import Any

from .configuration_diffusion_qwen3 import DiffusionQwen3Config


class A2DQwen3Config(DiffusionQwen3Config):
    """Fields of `DiffusionQwen3Config`, and what a diffusion model has to say of itself.

    Args:
        attention_pattern: `full`: every token sees every token.
        shifted: Whether logits at position i predict token i + 1 instead of token i.
        num_diffusion_steps: Denoising steps where a call of `generate` names none; None: one for
            each token.
    """

    model_type = "a2d-qwen3"

    def __init__(
        self,
        attention_pattern: str = "full",
        shifted: bool = False,
        num_diffusion_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.attention_pattern = attention_pattern
        self.shifted = shifted
        self.num_diffusion_steps = num_diffusion_steps
        super().__init__(**kwargs)
