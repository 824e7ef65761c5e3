"""Hugging Face checkpoint to Megatron: loads this rank's part of a model from safetensors."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_dlm.conversion.hf_checkpoint import HFCheckpoint, is_finite
from megatron_dlm.errors import bad_value
from megatron_dlm.models.architecture import Architecture, parameter_mappings
from megatron_dlm.models.families.parameters import EMBEDDING, HEAD, hf_tensor_shapes
from megatron_dlm.models.model_parameters import LocalParameter, local_parameters

Place = Callable[[torch.Tensor, torch.Tensor, Iterator[torch.Tensor]], None]
"""Takes a parameter, its shard of a tensor, and the other shards of it."""


@torch.no_grad()
def load_hf_weights(
    model: torch.nn.Module,
    architecture: Architecture,
    folder: str | Path,
    field: str = "--load",
    place: Place | None = None,
) -> None:
    """Load weights into a model in place, in its data type and on its device.

    Every rank reads only the slices of its own shard, one tensor at a time. Without communication:
    all ranks check the whole checkpoint, with the same result.

    Args:
        model: This rank's part of a `StageModel`, possibly wrapped for training. Master
            weights of an existing optimizer are not updated.
        architecture: Architecture of the model.
        folder: Hugging Face folder with safetensors.
        field: The flag that the folder came from, for error messages.
        place: Takes each parameter, its values, and those of the other shards of the same tensor,
            read one at a time; None: values are copied into the parameter.

    Raises:
        UserError: The checkpoint does not hold exactly the tensors of the architecture, or their
            values are not all finite.
    """
    for local, shard, others in _shards(model, architecture, folder, field):
        # `copy_` would broadcast.
        assert shard.shape == local.parameter.shape, local.mapping.megatron
        if place is None:
            local.parameter.copy_(shard)
        else:
            place(local.parameter, shard, others)


def check_weights_equal(
    model: torch.nn.Module, architecture: Architecture, folder: str | Path, field: str, remedy: str
) -> None:
    """Check that a checkpoint holds the weights of a model, without its adapters.

    Args:
        model: See `load_hf_weights`.
        architecture: Architecture of the model.
        folder: Hugging Face folder with safetensors.
        field: The flag that the folder came from, for error messages.
        remedy: What the user can do, for error messages.

    Raises:
        UserError: A tensor is missing, has another shape or, in the model's type, other values.
    """
    for local, shard, _ in _shards(model, architecture, folder, field):
        if not torch.equal(shard.to(local.parameter), local.parameter):
            names = " and ".join(local.mapping.hf)
            problem = f"other values of {names} than under the adapters"
            raise bad_value(field, str(folder), problem, remedy)


def _shards(
    model: torch.nn.Module, architecture: Architecture, folder: str | Path, field: str
) -> Iterator[tuple[LocalParameter, torch.Tensor, Iterator[torch.Tensor]]]:
    """This rank's parameters, each with its shard and the others; all is checked first."""
    checkpoint = HFCheckpoint(folder, field)
    checkpoint.check(
        hf_tensor_shapes(parameter_mappings(architecture)),
        copies={HEAD: EMBEDDING} if architecture.tie_word_embeddings else {},
    )
    for local in local_parameters(model, architecture, except_adapters=True):
        sources = [checkpoint[name] for name in local.mapping.hf]
        shard = local.mapping.layout.read(sources, local.parameter.shape, local.shard)
        dtype = local.parameter.dtype
        if not is_finite(shard, dtype):
            raise checkpoint.broken(local.mapping.hf, dtype)
        yield local, shard, _others(local, sources)


def _others(local: LocalParameter, sources: list[Any]) -> Iterator[torch.Tensor]:
    """The shards of other ranks, read one at a time."""
    for other in range(local.num_shards):
        if other != local.shard:
            yield local.mapping.layout.read(sources, local.parameter.shape, other)
