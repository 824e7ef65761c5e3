"""Parameters of a rank, counted on models that are built without memory.

Layers of a model are alike, so a model of one layer is built for each way to split tensors, and the
parameters of a pipeline stage are put together from its parts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import lcm

import torch
import torch.distributed as dist
from torch.nn import Module

from megatron_dlm import platform
from megatron_dlm.config import Config
from megatron_dlm.models.architecture import Architecture
from megatron_dlm.models.lora import attach_adapters, train_adapters_only
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.parallel import initialized
from megatron_dlm.planning.layouts import Layout


@dataclass(frozen=True)
class Parameters:
    """Elements of parameters of a rank.

    Attributes:
        dense: Outside of experts.
        experts: Of experts.
        trained_dense: Of `dense`, those that the optimizer updates.
        trained_experts: Of `experts`, likewise.
    """

    dense: int = 0
    experts: int = 0
    trained_dense: int = 0
    trained_experts: int = 0

    @property
    def all(self) -> int:
        """All of them."""
        return self.dense + self.experts

    @property
    def trained(self) -> int:
        """Those that the optimizer updates."""
        return self.trained_dense + self.trained_experts

    def __add__(self, other: "Parameters") -> "Parameters":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Parameters(*(a + b for a, b in pairs))

    def __mul__(self, times: int) -> "Parameters":
        return Parameters(*(times * value for value in vars(self).values()))


@dataclass(frozen=True)
class Parts:
    """Parameters of a rank by part of the model.

    Attributes:
        embedding: Input embeddings.
        layer: Of each layer.
        norm: The last norm.
        head: Output layer; none of its own where it is the embedding.
    """

    embedding: Parameters
    layer: Parameters
    norm: Parameters
    head: Parameters

    def stage(self, number: int, of: int, layers: int) -> Parameters:
        """Parameters of a rank of one of several pipeline stages; the last has the output layer."""
        total = self.layer * (layers // of)
        if number == 0:
            total += self.embedding
        if number == of - 1:
            is_tied_copy = self.head.all == 0 and of > 1
            total += self.norm + (self.embedding if is_tied_copy else self.head)
        return total


@contextmanager
def fake_ranks(config: Config, rank: int, world_size: int) -> Iterator[None]:
    """Process groups of a world of which only this process exists; nothing is sent.

    Raises:
        UserError: The process computes on a GPU already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    platform.select("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with initialized(config.changed(device="cpu")):
            yield
    finally:
        dist.destroy_process_group()


def meta_model(architecture: Architecture, config: Config) -> Module:
    """This rank's part of a model, with adapters if the run trains them, without values.

    Layers are Megatron's local ones whatever the run computes with: their parameters are as many.
    """
    lora = config.lora
    with platform.on_meta():
        model = build_model(architecture, config.changed(transformer_impl="local", fp8_format=None))
        if lora.lora_rank is not None:
            attach_adapters(
                model,
                rank=lora.lora_rank,
                alpha=lora.lora_alpha or lora.lora_rank,
                target_modules=lora.lora_target_modules,
                seed=0,
            )
            train_adapters_only(model)
    return model


def count(model: Module, prefix: str = "") -> Parameters:
    """Parameters whose names begin with a prefix."""
    total = Parameters()
    for name, parameter in model.named_parameters():
        if name.startswith(prefix):
            size = parameter.numel()
            trained = size if parameter.requires_grad else 0
            if ".experts." in name:
                total += Parameters(experts=size, trained_experts=trained)
            else:
                total += Parameters(dense=size, trained_dense=trained)
    return total


_known: dict[str, Parts] = {}
"""Of this process's plans, which have models in common."""


class ModelParts:
    """The `Parts` of a model for any layout; each way to split it is built once in a process.

    Args:
        architecture: Of the model.
        config: Of the run.
        is_frozen: Whether nothing of it is trained, and it has no adapters.
    """

    def __init__(self, architecture: Architecture, config: Config, *, is_frozen: bool = False):
        self._one_layer = replace(architecture, num_layers=1)
        self._config = config.changed(lora_rank=None) if is_frozen else config
        # All that decides which parameters there are.
        self._key = repr((self._one_layer, self._config.lora, self._config.model.bf16))

    def of(self, layout: Layout) -> Parts:
        """Those of a rank of a layout."""
        key = f"{self._key} {layout.tensor} {layout.expert} {layout.expert_tensor}"
        if key not in _known:
            _known[key] = self._build(layout)
        return _known[key]

    def _build(self, layout: Layout) -> Parts:
        world = lcm(layout.tensor, layout.expert * layout.expert_tensor)
        is_moe = self._one_layer.is_moe
        alone = replace(
            layout,
            pipeline=1,
            context=1,
            gpus=world,
            expert=layout.expert if is_moe else 1,
            expert_tensor=layout.expert_tensor if is_moe else layout.tensor,
        )
        config = self._config.changed(**alone.options(is_moe=is_moe))
        with fake_ranks(config, 0, world):
            model = meta_model(self._one_layer, config)
            names = ("embedding.", "decoder.layers.", "decoder.final_layernorm.", "output_layer.")
            parts = Parts(*(count(model, name) for name in names))
            assert count(model) == sum(vars(parts).values(), Parameters())
        return parts


def element_size(config: Config) -> int:
    """Bytes of a weight as the model computes with it."""
    return int((torch.bfloat16 if config.model.bf16 else torch.float32).itemsize)
