"""SDAR-MoE for plain transformers: SDAR with Qwen3's mixture of experts in every layer."""

from .configuration_sdar_moe import SDARMoeConfig
from .diffusion_generation import DiffusionGenerationMixin
from .diffusion_model import DiffusionLMHeadModel, DiffusionModel
from .moe_layers import MoeDecoderLayer


class SDARMoeModel(DiffusionModel):
    """The network without its output layer."""

    config_class = SDARMoeConfig
    _auto_class = "AutoModel"
    layer_class = MoeDecoderLayer


class SDARMoeForCausalLM(DiffusionLMHeadModel, DiffusionGenerationMixin):
    """The network with its output layer, and diffusion decoding."""

    config_class = SDARMoeConfig
    _auto_class = "AutoModelForCausalLM"
    model_class = SDARMoeModel
