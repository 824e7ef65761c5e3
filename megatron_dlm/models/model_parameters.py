"""The parameters of this rank's part of a model, under their names in the whole model."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_dlm.models.architecture import Architecture, parameter_mappings
from megatron_dlm.models.families.parameters import ParameterMapping
from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.models.parameter_layout import Replicated

_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+")
_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+")
ADAPTER_PARAMETER = re.compile(r"\.lora_[ab]$")
"""Names of adapters' parameters end in this."""
TIED_EMBEDDING = "embedding.word_embeddings.weight"
"""Name of the embeddings, which are the output layer too where the two are tied."""


@dataclass(frozen=True)
class TensorParallelRanks:
    """Rank of this process in the groups that parameters are split over.

    Attributes:
        dense: (rank, size) of the tensor-parallel group.
        expert: (rank, size) of the tensor-parallel group of experts.
    """

    dense: tuple[int, int]
    expert: tuple[int, int]

    @classmethod
    def from_parallel_state(cls) -> "TensorParallelRanks":
        """From Megatron-Core's process groups."""
        return cls(
            dense=(
                parallel_state.get_tensor_model_parallel_rank(),
                parallel_state.get_tensor_model_parallel_world_size(),
            ),
            expert=(
                parallel_state.get_expert_tensor_parallel_rank(),
                parallel_state.get_expert_tensor_parallel_world_size(),
            ),
        )


@dataclass(frozen=True)
class LocalParameter:
    """A parameter of this rank.

    Attributes:
        parameter: Its values, this rank's shard.
        mapping: Its tensors in the Hugging Face checkpoint.
        shard: Number of the shard.
        num_shards: Shards of the whole parameter; 1 if it is replicated.
    """

    parameter: Tensor
    mapping: ParameterMapping
    shard: int
    num_shards: int


def local_parameters(
    model: torch.nn.Module,
    architecture: Architecture,
    ranks: TensorParallelRanks | None = None,
    *,
    except_adapters: bool = False,
) -> Iterator[LocalParameter]:
    """All parameters of this rank's part of a `DiffusionGPTModel`, possibly wrapped for training.

    Args:
        model: The model, from either layer spec.
        architecture: What it was built from.
        ranks: Default: those of Megatron-Core's parallel state.
        except_adapters: Leave out those of adapters, which the family's table does not have.

    Raises:
        KeyError: The model has a parameter that is not in the family's table.
    """
    ranks = ranks or TensorParallelRanks.from_parallel_state()
    by_name: dict[str, ParameterMapping] = {}
    for mapping in parameter_mappings(architecture):
        by_name[mapping.megatron] = mapping
        if mapping.transformer_engine:
            by_name[mapping.transformer_engine] = mapping
    part = cast(DiffusionGPTModel, unwrap_model(model))
    for name, parameter in part.named_parameters():
        if except_adapters and ADAPTER_PARAMETER.search(name):
            continue
        mapping = by_name[global_name(part, name)]
        rank, size = ranks.expert if _EXPERT.search(name) else ranks.dense
        if isinstance(mapping.layout, Replicated):
            rank, size = 0, 1
        yield LocalParameter(parameter, mapping, shard=rank, num_shards=size)


def global_names(model: torch.nn.Module) -> dict[Tensor, str]:
    """The parameters of this rank's part of a model, with their names in the whole model.

    The names do not depend on the parallel layout: layers and experts have their index in the whole
    model, and the last pipeline stage's copy of tied embeddings has the name of the first one's.

    Args:
        model: A `DiffusionGPTModel`, possibly wrapped for training.
    """
    part = cast(DiffusionGPTModel, unwrap_model(model))
    return {
        parameter: TIED_EMBEDDING
        if getattr(parameter, "shared_embedding", False)
        else global_name(part, name)
        for name, parameter in part.named_parameters()
    }


def global_name(model: DiffusionGPTModel, name: str) -> str:
    """Turn this rank's layer and expert numbers into those of the whole model."""
    found = _LAYER.search(name)
    if found is None:
        return name
    layer = model.decoder.layers[int(found[0])]
    name = _LAYER.sub(str(layer.layer_number - 1), name)
    return _EXPERT.sub(lambda m: str(layer.mlp.local_expert_indices[int(m[0])]), name)
