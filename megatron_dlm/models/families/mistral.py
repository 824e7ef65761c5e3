"""Mistral, of the versions whose layers see all tokens before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_dlm.errors import bad_value
from megatron_dlm.models.families.base import ModelFamily, ModelType, register

if TYPE_CHECKING:
    from megatron_dlm.models.architecture import Architecture

_WINDOW = 4096
"""What transformers takes where config.json has no `sliding_window`; a null is none."""


def _check(config: Mapping[str, Any], where: str) -> None:
    window, longest = config.get("sliding_window", _WINDOW), config.get("max_position_embeddings")
    if window is not None and longest is not None and window < longest:
        raise bad_value(
            f"{where}: sliding_window",
            window,
            f"is less than max_position_embeddings = {longest}, and is not supported",
            "use a checkpoint whose sliding_window is null",
        )


def _config(architecture: Architecture) -> dict[str, Any]:
    return {"sliding_window": None}


register(
    ModelFamily(
        name="mistral",
        model_types=(ModelType("mistral", "MistralForCausalLM"),),
        nulls=("sliding_window",),
        check=_check,
        config=_config,
    )
)
