"""A2D-Qwen3 for plain transformers: Qwen3 with bidirectional attention and diffusion decoding."""

from .configuration_a2d_qwen3 import A2DQwen3Config
from .diffusion_generation import DiffusionGenerationMixin
from .diffusion_qwen3 import DiffusionQwen3LMHeadModel, DiffusionQwen3Model


class A2DQwen3Model(DiffusionQwen3Model):
    """The network without its output layer."""

    config_class = A2DQwen3Config
    _auto_class = "AutoModel"


class A2DQwen3LMHeadModel(DiffusionQwen3LMHeadModel, DiffusionGenerationMixin):
    """The network with its output layer, and diffusion decoding."""

    config_class = A2DQwen3Config
    _auto_class = "AutoModelForMaskedLM"
    model_class = A2DQwen3Model
