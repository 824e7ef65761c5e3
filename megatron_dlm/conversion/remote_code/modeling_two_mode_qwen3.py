"""Two-Mode-Qwen3 for plain transformers: a block-diffusion model that is autoregressive as well."""

from .configuration_two_mode_qwen3 import TwoModeQwen3Config
from .diffusion_generation import DiffusionGenerationMixin
from .diffusion_model import DiffusionLMHeadModel, DiffusionModel


class TwoModeQwen3Model(DiffusionModel):
    """The network without its output layer."""

    config_class = TwoModeQwen3Config
    _auto_class = "AutoModel"


class TwoModeQwen3LMHeadModel(DiffusionLMHeadModel, DiffusionGenerationMixin):
    """The network with its output layer, and diffusion decoding."""

    config_class = TwoModeQwen3Config
    _auto_class = "AutoModelForCausalLM"
    model_class = TwoModeQwen3Model
