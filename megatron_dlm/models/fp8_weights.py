"""Frozen linear layers whose weights are kept in 8-bit floats: half the memory of bfloat16.

A weight W [o, i] is e4m3 values times a scale for each output, its largest absolute value / 448:
y_j = s_j * (q_j . x). Every value is within 1 / 16 of itself, or within s_j / 1024 where it is
tiny. GPUs that multiply 8-bit floats do so, with a scale for each token of the input; elsewhere the
weights of a layer are widened for its product and forgotten.

S: tokens; i, o: inputs and outputs of this rank; L: experts of this rank.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter
from torch.nn.modules.module import register_module_parameter_registration_hook

from megatron_dlm import platform
from megatron_dlm.models.experts import ExpertLinear
from megatron_dlm.models.grouped_linear import grouped_linear
from megatron_dlm.models.lora_layers import LowRankAdapter
from megatron_dlm.models.model import chunks_of

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
MULTIPLIES_FROM = (9, 0)
"""Compute capability from which scales for each row are multiplied in."""
TILE = 16
"""Sizes of 8-bit products are multiples of this."""


def to_fp8(values: Tensor, group: ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """Round rows to e4m3 times a scale of their own: [..., i] -> [..., i], [..., 1] float32.

    Args:
        values: To round.
        group: Ranks that have the other parts of the rows; None: there are none.
    """
    values = values.float()
    largest = values.abs().amax(-1, keepdim=True)
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
    return _scaled(values, largest)


def _scaled(values: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Values [..., i] whose rows have these largest absolute values [..., 1]; see `to_fp8`."""
    scale = (largest / LARGEST).clamp(min=torch.finfo(torch.float).tiny)
    return (values / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


class _Fp8Weight(torch.nn.Module):
    """A weight [..., o, i] in e4m3.

    Args:
        weight: This rank's part; where it is on meta, `fill` gives the values later.
        group: Ranks that have the other inputs of the same outputs; None: there are none.
    """

    values: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, group: ProcessGroup | None) -> None:
        super().__init__()
        if weight.is_meta:
            device, shape = platform.device(), weight.shape
            values = torch.empty(shape, dtype=E4M3, device=device)
            scale = torch.empty(*shape[:-1], 1, dtype=torch.float32, device=device)
        else:
            values, scale = to_fp8(weight.detach(), group)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)

    def fill(self, weight: Tensor, others: Iterable[Tensor], expert: int | None) -> None:
        """Take the values of a weight [o, i], or of all experts' [L, o, i].

        Args:
            weight: This rank's part.
            others: The other parts of the same outputs, one at a time.
            expert: Whose it is; None where there are none, and for all of them.
        """
        largest = weight.float().abs().amax(-1, keepdim=True)
        for other in others:
            largest = torch.maximum(largest, other.float().abs().amax(-1, keepdim=True))
        values, scale = _scaled(weight.float(), largest)
        for own, new in ((self.values, values), (self.scale, scale)):
            (own if expert is None else own[expert]).copy_(new)

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weight, as far as e4m3 has kept it."""
        return (self.values.to(dtype) * self.scale.to(dtype)).detach()


_Linear: TypeAlias = ColumnParallelLinear | RowParallelLinear | ExpertLinear


class Fp8ParallelLinear(torch.nn.Module):
    """In place of a column- or row-parallel layer, forward only.

    Args:
        layer: Its weight is taken over.
    """

    def __init__(self, layer: ColumnParallelLinear | RowParallelLinear) -> None:
        super().__init__()
        self._is_column = isinstance(layer, ColumnParallelLinear)
        self._weight = _Fp8Weight(layer.weight, None if self._is_column else layer.tp_group)
        self.bias = layer.bias
        self._returns_bias = layer.skip_bias_add
        self._splits_sequence = layer.sequence_parallel
        self._group = layer.tp_group

    @property
    def weight(self) -> _Fp8Weight:
        """What `fill` takes values for."""
        return self._weight

    @property
    def splits_inputs(self) -> bool:
        """Whether ranks have parts of the inputs of every output."""
        return not self._is_column

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[S, 1, i] -> [S, 1, o]; sequence-parallel parts of S as of the layer it replaces."""
        if self._is_column and self._splits_sequence:
            input_ = gather_from_sequence_parallel_region(input_, group=self._group)
        output = self._product(input_)
        if not self._is_column and self._splits_sequence:
            output = reduce_scatter_to_sequence_parallel_region(output, group=self._group)
        elif not self._is_column:
            output = reduce_from_tensor_model_parallel_region(output, group=self._group)
        if self._returns_bias or self.bias is None:
            return output, self.bias
        return output + self.bias, None

    def _product(self, input_: Tensor) -> Tensor:
        weight = self._weight
        if not _multiplies(input_, weight.values):
            return F.linear(input_, weight.widened(input_.dtype))
        rows, scale = to_fp8(input_.flatten(0, -2))
        output: Tensor = torch._scaled_mm(
            rows,
            weight.values.t(),
            scale_a=scale,
            scale_b=weight.scale.t(),
            out_dtype=input_.dtype,
        )
        return output.view(*input_.shape[:-1], -1)


class Fp8ExpertLinear(torch.nn.Module):
    """In place of a layer of every expert of a rank, forward only; weights [L, o, i]."""

    def __init__(self, layer: ExpertLinear) -> None:
        super().__init__()
        self._weight = _Fp8Weight(layer.weight, None if layer.splits_outputs else layer.tp_group)
        self._splits_inputs = not layer.splits_outputs

    @property
    def weight(self) -> _Fp8Weight:
        """What `fill` takes values for."""
        return self._weight

    @property
    def splits_inputs(self) -> bool:
        """Whether ranks have parts of the inputs of every output."""
        return self._splits_inputs

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """See `ExpertLinear`."""
        return grouped_linear(rows, self._weight.widened(rows.dtype), ends)


def _multiplies(input_: Tensor, weight: Tensor) -> bool:
    """Whether the device of the input multiplies it with an 8-bit weight."""
    if not input_.is_cuda or input_.dtype != torch.bfloat16:
        return False
    if any(size % TILE for size in weight.shape):
        return False
    return torch.cuda.get_device_capability(input_.device) >= MULTIPLIES_FROM


def linear_layers(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str, _Linear]]:
    """The linear layers of a model's decoder: who has it, under which name, and the layer."""
    modules = [module for chunk in chunks_of(model) for module in chunk.decoder.modules()]
    return [
        (parent, name, child)
        for parent in modules
        for name, child in parent.named_children()
        if isinstance(child, _Linear)
    ]


def in_fp8(layer: _Linear) -> Fp8ParallelLinear | Fp8ExpertLinear:
    """The same layer with its weights in 8-bit floats; all ranks that share it call this."""
    if isinstance(layer, ExpertLinear):
        return Fp8ExpertLinear(layer)
    return Fp8ParallelLinear(layer)


@contextmanager
def linear_weights_without_memory() -> Iterator[None]:
    """Around building a model: weights of its decoder's linear layers are on meta when made.

    Only the decoder's layers take adapters. The output layer keeps its memory: where it is tied to
    the embedding of another pipeline stage, Megatron-Core sums both when the model is built.
    """

    def on_meta(module: torch.nn.Module, name: str, parameter: Parameter | None) -> Any:
        if parameter is None or name != "weight" or not isinstance(module, LowRankAdapter):
            return None
        return Parameter(parameter.detach().to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(on_meta)
    try:
        yield
    finally:
        handle.remove()


class Fp8Loading:
    """Loads a model that was built by `linear_weights_without_memory`, its decoder into e4m3.

    One tensor of the checkpoint is in memory at a time, and no communication is needed. Values do
    not depend on the number of ranks. Embedding, output layer, norms and routers stay as they are.

    Args:
        model: Its other weights have memory.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._layers = [(*place, in_fp8(place[2])) for place in linear_layers(model)]
        self._of_weight = {id(old.weight): new for _, _, old, new in self._layers}

    def place(self, parameter: Tensor, shard: Tensor, others: Iterable[Tensor]) -> None:
        """Take a tensor of the checkpoint.

        Args:
            parameter: Of the model, or a view of an expert's part of one.
            shard: Its values.
            others: Those of the other ranks that share the tensor, one at a time.
        """
        if not parameter.is_meta:
            parameter.copy_(shard)
            return
        is_whole = parameter._base is None
        base = parameter if parameter._base is None else parameter._base
        layer, dtype, device = self._of_weight[id(base)], parameter.dtype, platform.device()
        expert = None
        if isinstance(layer, Fp8ExpertLinear) and not is_whole:
            expert = parameter.storage_offset() // parameter.numel()
        needed = others if layer.splits_inputs else ()
        layer.weight.fill(
            shard.to(device, dtype), (other.to(device, dtype) for other in needed), expert
        )

    def finish(self) -> None:
        """Put the layers in their places."""
        for parent, name, _, layer in self._layers:
            setattr(parent, name, layer)
        for chunk in chunks_of(self._model):
            chunk.reads_early = False  # kernels get rows of whole tiles
