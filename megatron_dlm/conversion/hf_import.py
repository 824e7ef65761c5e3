"""Hugging Face checkpoint to Megatron: fills this rank's part of a model from safetensors."""

from pathlib import Path

import torch

from megatron_dlm.conversion.hf_checkpoint import HFCheckpoint
from megatron_dlm.conversion.model_parameters import local_parameters
from megatron_dlm.conversion.qwen3 import EMBEDDING, HEAD, hf_tensor_shapes, qwen3_mappings
from megatron_dlm.models.architecture import Architecture


@torch.no_grad()
def load_hf_weights(
    model: torch.nn.Module,
    architecture: Architecture,
    folder: str | Path,
    field: str = "--load",
) -> None:
    """Fill a model in place, in its own data type and on its own device.

    Every rank reads only the slices of its own shard, one tensor at a time. No communication: all
    ranks check the whole checkpoint and come to the same verdict.

    Args:
        model: This rank's part of a `DiffusionGPTModel`, possibly wrapped for training. Master
            weights of an optimizer built before are not updated.
        architecture: What the model was built from.
        folder: Hugging Face folder with safetensors.
        field: What the user named the folder with, for error messages.

    Raises:
        UserError: The checkpoint does not hold exactly the tensors of the architecture.
    """
    checkpoint = HFCheckpoint(folder, field)
    checkpoint.check(
        hf_tensor_shapes(qwen3_mappings(architecture)),
        copies={HEAD: EMBEDDING} if architecture.tie_word_embeddings else {},
    )
    for local in local_parameters(model, architecture):
        sources = [checkpoint[name] for name in local.mapping.hf]
        shard = local.mapping.layout.read(sources, local.parameter.shape, local.shard)
        # `copy_` would broadcast.
        assert shard.shape == local.parameter.shape, local.mapping.megatron
        local.parameter.copy_(shard)
