"""RND1 for plain transformers: A2D-Qwen3 with Qwen3's mixture of experts in every layer."""

from typing import ClassVar

from .configuration_rnd import RND1Config
from .modeling_a2d_qwen3 import A2DQwen3LMHeadModel, A2DQwen3Model
from .qwen3_layers import MoeDecoderLayer


class RND1Model(A2DQwen3Model):
    """The network without its output layer."""

    config_class = RND1Config
    layer_class = MoeDecoderLayer
    _no_split_modules: ClassVar = ["MoeDecoderLayer"]


class RND1LM(A2DQwen3LMHeadModel):
    """The network with its output layer, and diffusion decoding."""

    config_class = RND1Config
    model_class = RND1Model
    _no_split_modules: ClassVar = ["MoeDecoderLayer"]
