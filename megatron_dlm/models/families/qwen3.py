"""Qwen3 and Qwen3-MoE; the diffusion models SDAR, RND1 and dllm's A2D have their networks.

Queries and keys are normalised (Yang et al. 2025, Section 2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_dlm.models.families.base import ModelFamily, ModelType, register
from megatron_dlm.types.diffusion_kind import BLOCK_DIFFUSION, RND1, TWO_MODES

if TYPE_CHECKING:
    from megatron_dlm.models.architecture import Architecture

# Mixtures of experts have no default: hidden_size / num_attention_heads.
_DENSE = {"head_dim": 128}


def _config(architecture: Architecture) -> dict[str, Any]:
    config: dict[str, Any] = {
        "attention_bias": False,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    if architecture.is_moe:
        config |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": architecture.moe_ffn_hidden_size,
            "norm_topk_prob": architecture.norm_topk_prob,
            "num_experts": architecture.num_moe_experts,
            "num_experts_per_tok": architecture.moe_router_topk,
            "output_router_logits": False,
        }
        if "router_aux_loss_coef" in architecture.hf_config:
            config["router_aux_loss_coef"] = architecture.hf_config["router_aux_loss_coef"]
    return config


register(
    ModelFamily(
        name="qwen3",
        model_types=(
            ModelType("qwen3", "Qwen3ForCausalLM", defaults=_DENSE),
            ModelType("sdar", diffusion_kind=BLOCK_DIFFUSION, defaults=_DENSE),
            ModelType("qwen3_moe", "Qwen3MoeForCausalLM", is_moe=True),
            ModelType("sdar_moe", is_moe=True, diffusion_kind=BLOCK_DIFFUSION),
            ModelType("two-mode-qwen3_moe", is_moe=True, diffusion_kind=TWO_MODES),
            ModelType("rnd1", is_moe=True, diffusion_kind=RND1),
        ),
        qk_norm=True,
        config=_config,
    )
)
