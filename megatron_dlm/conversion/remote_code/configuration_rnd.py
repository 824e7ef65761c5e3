"""Configuration of RND1: the Qwen3-MoE architecture with bidirectional attention."""

from typing import Any

from .configuration_diffusion_qwen3 import DiffusionQwen3MoeConfig


class RND1Config(DiffusionQwen3MoeConfig):
    """Fields of `DiffusionQwen3MoeConfig`, and what a diffusion model has to say of itself.

    Args:
        attention_pattern: `full`: every token sees every token.
        shifted: Logits at position i predict token i + 1.
        num_diffusion_steps: Denoising steps where a call of `generate` names none; None: one for
            each token.
    """

    model_type = "rnd1"

    def __init__(
        self,
        attention_pattern: str = "full",
        shifted: bool = True,
        num_diffusion_steps: int | None = 256,
        **kwargs: Any,
    ) -> None:
        self.attention_pattern = attention_pattern
        self.shifted = shifted
        self.num_diffusion_steps = num_diffusion_steps
        super().__init__(**kwargs)
