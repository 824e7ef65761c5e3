"""Configuration of RND1: the Qwen3-MoE architecture with full attention and shifted logits."""

from typing import Any

from .configuration_diffusion_moe import DiffusionMoeConfig


class RND1Config(DiffusionMoeConfig):
    """Fields of `DiffusionMoeConfig`."""

    model_type = "rnd1"

    def __init__(self, shifted: bool = True, **kwargs: Any) -> None:
        super().__init__(shifted=shifted, **kwargs)
