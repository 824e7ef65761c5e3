"""SDAR-MoE for plain transformers: SDAR with Qwen3's mixture of experts in every layer."""

from typing import ClassVar

from .configuration_sdar_moe import SDARMoeConfig
from .modeling_sdar import SDARForCausalLM, SDARModel
from .qwen3_layers import MoeDecoderLayer


class SDARMoeModel(SDARModel):
    """The network without its output layer."""

    config_class = SDARMoeConfig
    layer_class = MoeDecoderLayer
    _no_split_modules: ClassVar = ["MoeDecoderLayer"]


class SDARMoeForCausalLM(SDARForCausalLM):
    """The network with its output layer, and decoding by blocks."""

    config_class = SDARMoeConfig
    model_class = SDARMoeModel
    _no_split_modules: ClassVar = ["MoeDecoderLayer"]
