"""A2D-Qwen3 for plain transformers: Qwen3 as a diffusion model of either attention."""

from .configuration_a2d_qwen3 import A2DQwen3Config
from .diffusion_generation import DiffusionGenerationMixin
from .diffusion_model import DiffusionLMHeadModel, DiffusionModel


class A2DQwen3Model(DiffusionModel):
    """The network without its output layer."""

    config_class = A2DQwen3Config
    _auto_class = "AutoModel"


class A2DQwen3LMHeadModel(DiffusionLMHeadModel, DiffusionGenerationMixin):
    """The network with its output layer, and diffusion decoding."""

    config_class = A2DQwen3Config
    _auto_class = "AutoModelForMaskedLM"
    model_class = A2DQwen3Model
