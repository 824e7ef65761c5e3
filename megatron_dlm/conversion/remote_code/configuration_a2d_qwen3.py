"""Configuration of A2D-Qwen3: the Qwen3 architecture made a diffusion model."""

from typing import Any

from .configuration_diffusion import DiffusionConfig


class A2DQwen3Config(DiffusionConfig):
    """Fields of `DiffusionConfig`."""

    model_type = "a2d-qwen3"

    # transformers 5 writes a constructor, without our defaults, for a class that has none.
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
