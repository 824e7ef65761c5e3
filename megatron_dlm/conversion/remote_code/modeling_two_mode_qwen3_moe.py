"""Two-Mode-Qwen3-MoE for plain transformers: Two-Mode-Qwen3 with experts in every layer."""

from .configuration_two_mode_qwen3_moe import TwoModeQwen3MoeConfig
from .diffusion_generation import DiffusionGenerationMixin
from .diffusion_model import DiffusionLMHeadModel, DiffusionModel
from .moe_layers import MoeDecoderLayer


class TwoModeQwen3MoeModel(DiffusionModel):
    """The network without its output layer."""

    config_class = TwoModeQwen3MoeConfig
    _auto_class = "AutoModel"
    layer_class = MoeDecoderLayer


class TwoModeQwen3MoeLMHeadModel(DiffusionLMHeadModel, DiffusionGenerationMixin):
    """The network with its output layer, and diffusion decoding."""

    config_class = TwoModeQwen3MoeConfig
    _auto_class = "AutoModelForCausalLM"
    model_class = TwoModeQwen3MoeModel
