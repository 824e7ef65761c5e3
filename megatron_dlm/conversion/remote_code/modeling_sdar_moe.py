"""SDAR-MoE for plain transformers: SDAR with Qwen3's mixture of experts in every layer."""

from .block_causal_generation import BlockCausalGeneration
from .configuration_sdar_moe import SDARMoeConfig
from .diffusion_qwen3 import DiffusionQwen3LMHeadModel, DiffusionQwen3Model
from .qwen3_moe_layers import MoeDecoderLayer


class SDARMoeModel(DiffusionQwen3Model):
    """The network without its output layer."""

    config_class = SDARMoeConfig
    layer_class = MoeDecoderLayer


class SDARMoeForCausalLM(BlockCausalGeneration, DiffusionQwen3LMHeadModel):
    """The network with its output layer, and diffusion decoding."""

    config_class = SDARMoeConfig
    model_class = SDARMoeModel
