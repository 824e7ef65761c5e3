"""Low-rank adapters on a whole model: attach, switch off, merge."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_dlm.models.attention_layout import Field
from megatron_dlm.models.experts import ExpertLinear
from megatron_dlm.models.lora_layers import LoRAColumnParallelLinear, LowRankAdapter
from megatron_dlm.models.model import DiffusionGPTModel, chunks_of
from megatron_dlm.models.model_parameters import ADAPTER_PARAMETER, global_name, parts_by_expert
from megatron_dlm.seeding import keyed_generator


def _modules(
    model: torch.nn.Module,
) -> Iterator[tuple[DiffusionGPTModel, str, torch.nn.Module]]:
    """Model chunks with the name of each module in the chunk, and the module."""
    for chunk in chunks_of(model):
        for name, module in chunk.named_modules():
            yield chunk, name, module


def _layers(model: torch.nn.Module) -> Iterator[tuple[str, LowRankAdapter]]:
    """Layers that can have an adapter, by their names in the whole model."""
    for part, name, module in _modules(model):
        if isinstance(module, LowRankAdapter):
            yield global_name(part, name), module


def _adapters(
    model: torch.nn.Module,
) -> Iterator[tuple[LowRankAdapter, list[str]]]:
    """Layers that can have an adapter, with the names of what it adapts: one, or one an expert."""
    for part, name, module in _modules(model):
        if isinstance(module, LowRankAdapter):
            weights = parts_by_expert(part, name, module.weight)
            yield module, [whole_name for whole_name, _ in weights]


def can_have_adapters(model: torch.nn.Module) -> bool:
    """Whether the model's linear layers are of the kind that can carry adapters."""
    return any(True for _ in _layers(model))


def attach_adapters(
    model: torch.nn.Module, *, rank: int, alpha: float, target_modules: Sequence[str], seed: int
) -> None:
    """Attach an adapter to every layer of the named kinds; the model's output stays as it is.

    A is uniform in +-1 / sqrt(inputs), keyed by seed, layer and expert, so that it depends on no
    parallel layout; B is zero.

    Args:
        model: This rank's part of a model with Megatron's local layers, not wrapped yet.
        rank: r.
        alpha: The adapter is scaled by alpha / r.
        target_modules: Last names of the layers, such as linear_qkv.
        seed: Seed of A.
    """
    for layer, names in _adapters(model):
        if names[0].rpartition(".")[2] in target_modules:
            size = layer.in_features_total
            draws = [
                torch.rand(rank, size, generator=keyed_generator(seed, name)) for name in names
            ]
            uniform = torch.stack(draws) if isinstance(layer, ExpertLinear) else draws[0]
            layer.attach_adapter((2.0 * uniform - 1.0) / size**0.5, alpha)


def drop_out_adapter_inputs(model: torch.nn.Module, dropout: float, seed: int) -> None:
    """Switch on dropout of the adapters' inputs in training; see `models.adapter_dropout`.

    Args:
        model: This rank's part of a model with adapters, whose rows come with keys of their tokens
            when it is trained (`objectives.token_keys`).
        dropout: Probability of each input to be dropped.
        seed: With the layer's name, decides which inputs.
    """
    for name, layer in _layers(model):
        layer.lora_dropout = dropout
        generator = keyed_generator(seed, name, "dropout")
        layer.dropout_salt = int(torch.randint(0, 2**31 - 1, (), generator=generator))
    for _, _, module in _modules(model):
        if isinstance(module, TransformerLayer):
            _keep_keys_at_hand(module)
    for chunk in chunks_of(model):
        chunk.reads_early = False  # adapters have the keys of a whole row


def of_updates(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a hook that does nothing in a forward of a rollout: it need not be called there."""
    hook.is_of_updates = True  # type: ignore[attr-defined]
    return hook


def _keep_keys_at_hand(layer: TransformerLayer) -> None:
    """Give the adapters of a layer the keys of its current row, during each forward of the layer.

    Not once per micro-batch: pipeline schedules and recomputation alternate between rows.
    """
    adapters = [module for module in layer.modules() if isinstance(module, LowRankAdapter)]

    def before(module: TransformerLayer, arguments: Any, keywords: dict[str, Any]) -> None:
        layout = keywords["attention_mask"]
        has_keys = isinstance(layout, Tensor) and len(layout) > Field.KEY
        tokens = keywords["rotary_pos_emb"].shape[1]  # the last ones, of a share of a row
        for adapter in adapters:
            adapter.token_keys = layout[Field.KEY, -tokens:] if has_keys else None

    def after(module: TransformerLayer, arguments: Any, output: Any) -> None:
        for adapter in adapters:
            adapter.token_keys = None

    layer.register_forward_pre_hook(of_updates(before), with_kwargs=True)
    layer.register_forward_hook(of_updates(after))


def train_adapters_only(model: torch.nn.Module) -> None:
    """Freeze everything but the adapters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(ADAPTER_PARAMETER.search(name) is not None)
    part = chunks_of(model)[0]
    if part.pre_process:
        # Recomputed layers only have a gradient if their input asks for one, and the output of
        # frozen embeddings does not.
        part.embedding.register_forward_hook(of_updates(_ask_for_gradient))


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


def linear_layers_by_weight(model: torch.nn.Module) -> dict[Tensor, LowRankAdapter]:
    """The layers that may have adapters, by their weights."""
    return {layer.weight: layer for _, layer in _layers(model)}


def remove_adapters(model: torch.nn.Module) -> None:
    """Take the adapters away; the weights stay as they are."""
    for _, layer in _layers(model):
        if layer.lora_a is not None:
            layer.remove_adapter()


@dataclass(frozen=True)
class LocalAdapterPart:
    """This rank's part of the A or B of a layer.

    Attributes:
        name: In the whole model; ends in `lora_a` or `lora_b`.
        tensor: Its values.
        shard: Number of the part.
        num_shards: Parts of the whole; 1 if every rank has it.
    """

    name: str
    tensor: Tensor
    shard: int
    num_shards: int


def local_adapters(model: torch.nn.Module) -> Iterator[LocalAdapterPart]:
    """The parts of all adapters that this rank holds."""
    for layer, names in _adapters(model):
        if layer.lora_a is None or layer.lora_b is None:
            continue
        split, whole = (layer.tp_group.rank(), layer.tp_group.size()), (0, 1)
        if isinstance(layer, ExpertLinear):
            is_column, matrices = layer.splits_outputs, zip(layer.lora_a, layer.lora_b, strict=True)
        else:
            is_column = isinstance(layer, LoRAColumnParallelLinear)
            matrices = zip([layer.lora_a], [layer.lora_b], strict=True)
        for name, (lora_a, lora_b) in zip(names, matrices, strict=True):
            yield LocalAdapterPart(f"{name}.lora_a", lora_a, *(whole if is_column else split))
            yield LocalAdapterPart(f"{name}.lora_b", lora_b, *(split if is_column else whole))
