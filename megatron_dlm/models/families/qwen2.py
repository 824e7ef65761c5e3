"""Qwen2 and Qwen2.5: biases of the projections to queries, keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_dlm.models.families.base import ModelFamily, ModelType, register

if TYPE_CHECKING:
    from megatron_dlm.models.architecture import Architecture


def _config(architecture: Architecture) -> dict[str, Any]:
    return {"sliding_window": None, "use_sliding_window": False}


register(
    ModelFamily(
        name="qwen2",
        model_types=(ModelType("qwen2", "Qwen2ForCausalLM"),),
        qkv_bias=True,
        config=_config,
    )
)
