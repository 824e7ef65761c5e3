"""The parameters of this rank's part of a model, under their names in the whole model."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_dlm.models.architecture import Architecture, parameter_mappings
from megatron_dlm.models.families.parameters import ParameterMapping
from megatron_dlm.models.model import DiffusionGPTModel, chunks_of
from megatron_dlm.models.parameter_layout import Replicated

_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+")
_OF_EXPERTS = re.compile(r"(?<=\.mlp\.experts\.)(linear_fc[12](?:\.weight|\.lora_[ab])?)(\d*)$")
"""Layers of a rank's experts and their parameters: stacked, or Transformer Engine's with a number
for each expert of the rank."""
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
        parameter: Its values, this rank's shard; of a rank's experts, a view of one expert's.
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
    for part, name, parameter in _by_chunk(model):
        if except_adapters and ADAPTER_PARAMETER.search(name):
            continue
        for whole_name, values in parts_by_expert(part, name, parameter):
            mapping = by_name[whole_name]
            rank, size = ranks.expert if mapping.is_of_expert else ranks.dense
            if isinstance(mapping.layout, Replicated):
                rank, size = 0, 1
            yield LocalParameter(values, mapping, shard=rank, num_shards=size)


def global_names(model: torch.nn.Module) -> dict[Tensor, str]:
    """The parameters of this rank's part of a model, with their names in the whole model.

    The names do not depend on the parallel layout: layers have their index in the whole model, the
    experts of a layer have one name together, and the last pipeline stage's copy of tied embeddings
    has the name of the first one's.

    Args:
        model: A `DiffusionGPTModel`, possibly wrapped for training.
    """
    return {
        parameter: TIED_EMBEDDING
        if getattr(parameter, "shared_embedding", False)
        else global_name(part, name)
        for part, name, parameter in _by_chunk(model)
    }


def _by_chunk(model: torch.nn.Module) -> Iterator[tuple[DiffusionGPTModel, str, Tensor]]:
    """Model chunks with the name of each parameter in the chunk, and the parameter."""
    for chunk in chunks_of(model):
        for name, parameter in chunk.named_parameters():
            yield chunk, name, parameter


def global_name(model: DiffusionGPTModel, name: str) -> str:
    """Turn this rank's layer number into that of the whole model; leave experts' numbers out."""
    found = _LAYER.search(name)
    if found is None:
        return name
    layer = model.decoder.layers[int(found[0])]
    name = _LAYER.sub(str(layer.layer_number - 1), name)
    return _OF_EXPERTS.sub(r"\1", name)


def parts_by_expert(
    model: DiffusionGPTModel, name: str, values: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Split what a rank's experts hold together; anything else is one part.

    Args:
        model: This rank's part of the model.
        name: A layer's or parameter's name in it.
        values: With the experts along the first axis, where it is stacked.

    Returns:
        Views of the values, by names with the numbers that layers and experts have in the whole
        model.
    """
    whole_name, found = global_name(model, name), _OF_EXPERTS.search(name)
    if found is None:
        yield whole_name, values
        return
    layer = _LAYER.search(name)
    assert layer is not None
    experts = model.decoder.layers[int(layer[0])].mlp.local_expert_indices
    parts = [(experts[int(found[2])], values)] if found[2] else zip(experts, values, strict=True)
    for expert, part in parts:
        yield _OF_EXPERTS.sub(rf"local_experts.{expert}.\1", whole_name), part
