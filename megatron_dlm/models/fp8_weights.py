"""Frozen linear layers whose weights are kept in 8-bit floats: half the memory of bfloat16.

A weight W [o, i] is e4m3 values times a scale for each output, its largest absolute value / 448:
y_j = s_j * (q_j . x). Every value is within 1 / 16 of itself, or within s_j / 1024 where it is
tiny. GPUs that multiply 8-bit floats do so, with a scale for each token of the input; elsewhere the
weights of a layer are widened for its product and forgotten.

S: tokens; i, o: inputs and outputs of this rank; L: experts of this rank.
"""

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

from megatron_dlm.models.experts import ExpertLinear
from megatron_dlm.models.grouped_linear import grouped_linear
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
    scale = (largest / LARGEST).clamp(min=torch.finfo(torch.float).tiny)
    return (values / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


class _Fp8Weight(torch.nn.Module):
    """A weight [..., o, i] in e4m3.

    Args:
        weight: This rank's part.
        group: Ranks that have the other inputs of the same outputs; None: there are none.
    """

    values: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, group: ProcessGroup | None) -> None:
        super().__init__()
        values, scale = to_fp8(weight.detach(), group)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weight, as far as e4m3 has kept it."""
        return (self.values.to(dtype) * self.scale.to(dtype)).detach()


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


def keep_in_fp8(model: torch.nn.Module) -> None:
    """Replace the linear layers of a frozen model's decoder by ones in 8-bit floats, one by one.

    All ranks of the model call this. Values do not depend on how many these are.

    Embedding, output layer, norms and routers stay as they are.
    """
    modules = [module for chunk in chunks_of(model) for module in chunk.decoder.modules()]
    for parent in modules:
        for name, child in list(parent.named_children()):
            if isinstance(child, ColumnParallelLinear | RowParallelLinear):
                setattr(parent, name, Fp8ParallelLinear(child))
            elif isinstance(child, ExpertLinear):
                setattr(parent, name, Fp8ExpertLinear(child))


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's weights on this rank, scales included."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
