"""Llama, of the second and the third generation, without biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_dlm.models.families.base import ModelFamily, ModelType, register

if TYPE_CHECKING:
    from megatron_dlm.models.architecture import Architecture

# Files of the second generation may state no base.
_DEFAULTS = {"rope_theta": 10000.0}


def _config(architecture: Architecture) -> dict[str, Any]:
    return {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}


register(
    ModelFamily(
        name="llama",
        model_types=(ModelType("llama", "LlamaForCausalLM", defaults=_DEFAULTS),),
        config=_config,
    )
)
