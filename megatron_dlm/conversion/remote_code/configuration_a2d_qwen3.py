"""Configuration of A2D-Qwen3: the Qwen3 architecture made a diffusion model."""

from typing import Any

from .configuration_diffusion_qwen3 import DiffusionQwen3Config


class A2DQwen3Config(DiffusionQwen3Config):
    """Fields of `DiffusionQwen3Config`."""

    model_type = "a2d-qwen3"

    # transformers 5 writes a constructor, without our defaults, for a class that has none.
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
