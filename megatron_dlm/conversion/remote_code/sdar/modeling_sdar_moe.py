"""SDAR-MoE for plain transformers: SDAR with Qwen3's mixture of experts in every layer.

T: tokens; h: hidden size; E: experts; k: experts of a token.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from .configuration_sdar_moe import SDARMoeConfig
from .modeling_sdar import SDARMLP, SDARDecoderLayer, SDARForCausalLM, SDARModel


class SDARMoeSparseMoeBlock(nn.Module):
    """Each token goes to its k most likely experts."""

    def __init__(self, config: SDARMoeConfig) -> None:
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            [SDARMLP(config, config.moe_intermediate_size) for _ in range(config.num_experts)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        tokens = x.flatten(0, -2)  # [T, h]
        probabilities = self.gate(tokens).float().softmax(dim=-1)  # [T, E]
        weights, chosen = probabilities.topk(self.experts_per_token, dim=-1)  # [T, k]
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x.dtype)
        output = torch.zeros_like(tokens)
        for number in chosen.unique().tolist():
            token, choice = (chosen == number).nonzero(as_tuple=True)
            result = self.experts[number](tokens[token]) * weights[token, choice, None]
            output.index_add_(0, token, result)
        return output.view_as(x)


class SDARMoeDecoderLayer(SDARDecoderLayer):
    """A layer of SDAR with experts."""

    mlp_class = SDARMoeSparseMoeBlock


class SDARMoeModel(SDARModel):
    """The network without its output layer."""

    config_class = SDARMoeConfig
    layer_class = SDARMoeDecoderLayer
    _no_split_modules: ClassVar = ["SDARMoeDecoderLayer"]


class SDARMoeForCausalLM(SDARForCausalLM):
    """The network with its output layer, and decoding by blocks."""

    config_class = SDARMoeConfig
    model_class = SDARMoeModel
    _no_split_modules: ClassVar = ["SDARMoeDecoderLayer"]
