"""RND1 for plain transformers: A2D-Qwen3 with Qwen3's mixture of experts in every layer."""

from .configuration_rnd import RND1Config
from .diffusion_generation import DiffusionGenerationMixin
from .diffusion_qwen3 import DiffusionQwen3LMHeadModel, DiffusionQwen3Model
from .qwen3_moe_layers import MoeDecoderLayer


class RND1Model(DiffusionQwen3Model):
    """The network without its output layer."""

    config_class = RND1Config
    _auto_class = "AutoModel"
    layer_class = MoeDecoderLayer


class RND1LM(DiffusionQwen3LMHeadModel, DiffusionGenerationMixin):
    """The network with its output layer, and diffusion decoding."""

    config_class = RND1Config
    _auto_class = "AutoModelForMaskedLM"
    model_class = RND1Model
