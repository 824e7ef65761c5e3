"""Configuration of a diffusion model of Qwen3-MoE's architecture."""

from typing import Any

from .configuration_diffusion import DiffusionConfig


class DiffusionMoeConfig(DiffusionConfig):
    """Fields of `DiffusionConfig`, and those of Qwen3's mixture of experts."""

    def __init__(
        self,
        num_experts: int = 128,
        num_experts_per_tok: int = 8,
        moe_intermediate_size: int = 768,
        norm_topk_prob: bool = True,
        **kwargs: Any,
    ) -> None:
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.norm_topk_prob = norm_topk_prob
        super().__init__(**kwargs)
