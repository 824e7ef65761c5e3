"""Layers of Qwen3-MoE: a decoder with a mixture of experts in each, for plain transformers.

T: tokens; E: experts; k: experts of a token.
"""

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from .layers import MLP, DecoderLayer


class SparseMoeBlock(nn.Module):
    """Each token goes to its k most likely experts."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            [MLP(config, config.moe_intermediate_size) for _ in range(config.num_experts)]
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


class MoeDecoderLayer(DecoderLayer):
    """A layer with experts."""

    mlp_class = SparseMoeBlock
