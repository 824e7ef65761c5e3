"""Low-rank adapters on a whole model: attach, switch off, merge."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_dlm.conversion.model_parameters import global_name
from megatron_dlm.data.seeding import keyed_generator
from megatron_dlm.models.lora_layers import LowRankAdapter
from megatron_dlm.models.model import DiffusionGPTModel

ADAPTER_PARAMETER = re.compile(r"\.lora_[ab]$")
"""Names of adapters' parameters end in this."""


def _layers(model: torch.nn.Module) -> Iterator[tuple[str, LowRankAdapter]]:
    """Layers that can have an adapter, by their names in the whole model."""
    part = cast(DiffusionGPTModel, unwrap_model(model))
    for name, module in part.named_modules():
        if isinstance(module, LowRankAdapter):
            yield global_name(part, name), module


def can_have_adapters(model: torch.nn.Module) -> bool:
    """Whether the model's linear layers are of the kind that can carry adapters."""
    return any(True for _ in _layers(model))


def attach_adapters(
    model: torch.nn.Module, *, rank: int, alpha: float, target_modules: Sequence[str], seed: int
) -> None:
    """Attach an adapter to every layer of the named kinds; the model's output stays as it is.

    A is uniform in +-1 / sqrt(inputs), keyed by seed and layer so that it does not depend on the
    parallel layout; B is zero.

    Args:
        model: This rank's part of a model with Megatron's local layers, not wrapped yet.
        rank: r.
        alpha: The adapter is scaled by alpha / r.
        target_modules: Last names of the layers, such as linear_qkv.
        seed: Seed of A.
    """
    for name, layer in _layers(model):
        if name.rpartition(".")[2] in target_modules:
            size = layer.in_features_total
            uniform = torch.rand(rank, size, generator=keyed_generator(seed, name))
            layer.attach_adapter((2.0 * uniform - 1.0) / size**0.5, alpha)


def train_adapters_only(model: torch.nn.Module) -> None:
    """Freeze everything but the adapters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(ADAPTER_PARAMETER.search(name) is not None)
    part = cast(DiffusionGPTModel, unwrap_model(model))
    if part.pre_process:
        # Recomputed layers only have a gradient if their input asks for one, and the output of
        # frozen embeddings does not.
        part.embedding.register_forward_hook(_ask_for_gradient)


def _ask_for_gradient(module: torch.nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


@contextmanager
def adapters_disabled(model: torch.nn.Module) -> Iterator[None]:
    """Run the model as it was before its adapters were attached."""
    layers = [layer for _, layer in _layers(model) if layer.adapter_enabled]
    for layer in layers:
        layer.adapter_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.adapter_enabled = True


def merge_adapters(model: torch.nn.Module) -> None:
    """Add each adapter, (alpha / r) B A, to its layer's weight and remove it."""
    for _, layer in _layers(model):
        if layer.lora_a is not None:
            layer.merge_adapter()
