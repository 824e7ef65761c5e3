"""Configuration of RND1: the Qwen3-MoE architecture with full attention and shifted logits."""

from typing import Any

from .configuration_diffusion_qwen3_moe import DiffusionQwen3MoeConfig


class RND1Config(DiffusionQwen3MoeConfig):
    """Fields of `DiffusionQwen3MoeConfig`."""

    model_type = "rnd1"

    def __init__(
        self, shifted: bool = True, num_diffusion_steps: int | None = 256, **kwargs: Any
    ) -> None:
        super().__init__(shifted=shifted, num_diffusion_steps=num_diffusion_steps, **kwargs)
