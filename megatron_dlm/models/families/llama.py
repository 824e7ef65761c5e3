"""Llama, of the second and the third generation, without biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_dlm.models.families.base import ModelFamily, ModelType, register
from megatron_dlm.types.diffusion_kind import TWO_MODES

if TYPE_CHECKING:
    from megatron_dlm.models.architecture import Architecture

# Files of the second generation may state no base.
_DEFAULTS = {"rope_theta": 10000.0}


def _config(architecture: Architecture) -> dict[str, Any]:
    return {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}


register(
    ModelFamily(
        name="llama",
        model_types=(
            ModelType("llama", "LlamaForCausalLM", defaults=_DEFAULTS),
            ModelType("a2d-llama", states_attention=False, defaults=_DEFAULTS),
            ModelType("two-mode-llama", diffusion_kind=TWO_MODES, defaults=_DEFAULTS),
        ),
        config=_config,
    )
)
