"""SDAR for plain transformers: Qwen3 with block-causal attention and decoding by blocks."""

from .configuration_sdar import SDARConfig
from .diffusion_generation import DiffusionGenerationMixin
from .diffusion_model import DiffusionLMHeadModel, DiffusionModel


class SDARModel(DiffusionModel):
    """The network without its output layer."""

    config_class = SDARConfig
    _auto_class = "AutoModel"


class SDARForCausalLM(DiffusionLMHeadModel, DiffusionGenerationMixin):
    """The network with its output layer, and diffusion decoding."""

    config_class = SDARConfig
    _auto_class = "AutoModelForCausalLM"
    model_class = SDARModel
