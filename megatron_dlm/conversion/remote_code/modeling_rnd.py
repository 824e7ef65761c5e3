"""RND1 for plain transformers: A2D-Qwen3 with Qwen3's mixture of experts in every layer."""

from .configuration_rnd import RND1Config
from .diffusion_generation import DiffusionGenerationMixin
from .diffusion_model import DiffusionLMHeadModel, DiffusionModel
from .moe_layers import MoeDecoderLayer


class RND1Model(DiffusionModel):
    """The network without its output layer."""

    config_class = RND1Config
    _auto_class = "AutoModel"
    layer_class = MoeDecoderLayer


class RND1LM(DiffusionLMHeadModel, DiffusionGenerationMixin):
    """The network with its output layer, and diffusion decoding."""

    config_class = RND1Config
    _auto_class = "AutoModelForMaskedLM"
    model_class = RND1Model
