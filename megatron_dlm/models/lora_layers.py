"""Megatron's parallel linear layers with an optional low-rank adapter (LoRA, Hu et al. 2021).

y = W x + (alpha / r) B A x. The adapter is split like its layer: of a column-parallel layer every
rank holds A whole and its rows of B, of a row-parallel one its columns of A and B whole. Only
activations of width r are exchanged for it.

Not PEFT's `LoraParallelLinear`: it leaves the gradients of what it replicates unreduced under
sequence parallelism, and neither its names nor its shards fit distributed checkpoints. Not that of
Megatron-Bridge (NeMo's successor): `megatron.bridge.peft.lora` imports Transformer Engine, which
needs CUDA, and here adapters train on a CPU with Megatron-Core alone.

S: tokens (a part of them under sequence parallelism); r: rank; tp: tensor-parallel size.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Parameter

from megatron_dlm.megatron_internals import stored_by_halves
from megatron_dlm.models.adapter_dropout import drop_inputs


class LowRankAdapter(ABC):
    """Common part of both kinds of layer: the adapter's parameters and operations on them.

    Attributes:
        lora_a: This rank's part of A [r, in], or None without adapter. Layers of experts have all
            matrices with one axis more, the first, for the experts of this rank.
        lora_b: This rank's part of B [out, r], or None without adapter.
        lora_scale: alpha / r.
        adapter_enabled: Whether the forward pass adds the adapter's output.
        lora_dropout: Probability with which an input of the adapter is dropped in training.
        dropout_salt: With a token's key, decides which inputs are dropped.
        token_keys: [S] keys of the tokens of the current row, or None.
    """

    weight: Parameter
    input_size: int
    tp_group: Any
    lora_a: Parameter | None
    lora_b: Parameter | None
    lora_scale: float
    adapter_enabled: bool
    lora_dropout: float
    dropout_salt: int
    token_keys: Tensor | None
    training: bool

    @property
    def in_features_total(self) -> int:
        """Input size of the whole layer."""
        return int(self.input_size)

    @abstractmethod
    def local_columns(self, lora_a: Tensor) -> Tensor:
        """This rank's part of a whole A [r, in]."""

    @property
    def first_input(self) -> int:
        """Index of this rank's first input in the whole layer."""
        return 0

    def adapter_input(self, input_: Tensor) -> Tensor:
        """The adapter's input: the layer's input, with dropout in training."""
        if not (self.training and self.lora_dropout):
            return input_
        assert self.token_keys is not None, "a row without keys of its tokens"
        return drop_inputs(
            input_,
            self.token_keys,
            self.dropout_salt,
            self.first_input,
            self.lora_dropout,
            self.tp_group.rank(),
        )

    def attach_adapter(self, lora_a: Tensor, alpha: float) -> None:
        """Add an adapter that changes nothing yet: B is zero.

        Args:
            lora_a: The whole A [r, in], the same on every rank that has the layer.
            alpha: Numerator of the scale.
        """
        rank, weight = lora_a.shape[-2], self.weight
        self.lora_a = Parameter(self.local_columns(lora_a).to(weight).contiguous())
        self.lora_b = Parameter(weight.new_zeros(*weight.shape[:-1], rank))
        self.lora_scale = alpha / rank
        self.adapter_enabled = True
        self._mark_shards(self.lora_a, self.lora_b)

    @abstractmethod
    def _mark_shards(self, lora_a: Parameter, lora_b: Parameter) -> None:
        """Mark for Megatron which of the two is split and which needs its gradient summed."""

    def _without_adapter(self) -> None:
        self.lora_a = self.lora_b = None
        self.lora_scale = 0.0
        self.adapter_enabled = False
        self.lora_dropout = 0.0
        self.dropout_salt = 0
        self.token_keys = None

    @torch.no_grad()
    def merge_adapter(self) -> None:
        """Add the adapter to the weight, in float32, and remove it."""
        assert self.lora_a is not None
        assert self.lora_b is not None
        self.weight.copy_(self.merged(self.weight, self.lora_a, self.lora_b))
        self.remove_adapter()

    def merged(self, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        """A weight of this layer with an adapter added to it, in float32."""
        return weight.float() + self.lora_scale * (lora_b.float() @ lora_a.float())

    def remove_adapter(self) -> None:
        """Take the adapter away; the weight stays as it is."""
        self.lora_a = self.lora_b = None
        self.adapter_enabled = False


def _sharded_state(
    layer: torch.nn.Module,
    prefix: str,
    split_axes: dict[str, int],
    sharded_offsets: Any,
    metadata: Any,
) -> dict[str, Any]:
    """The layer's tensors for a distributed checkpoint; those in `split_axes` are split there."""
    state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        layer.state_dict(prefix="", keep_vars=True),
        prefix,
        split_axes,
        sharded_offsets,
        tp_group=layer.tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )
    return state


class LoRAColumnParallelLinear(ColumnParallelLinear, LowRankAdapter):
    """A column-parallel layer: linear_qkv, linear_fc1. Without adapter it is its parent."""

    def __init__(self, *args: Any, stride: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, stride=stride, **kwargs)
        self._is_gate_and_up = stride == 2  # as Megatron marks the two halves of SwiGLU
        self._without_adapter()

    def local_columns(self, lora_a: Tensor) -> Tensor:
        """See `LowRankAdapter`."""
        return lora_a

    def _mark_shards(self, lora_a: Parameter, lora_b: Parameter) -> None:
        set_tensor_model_parallel_attributes(lora_b, True, 0, 1)
        lora_a.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See the parent; [S, 1, in] -> [S of all ranks, 1, out / tp]."""
        output, bias = super().forward(input_, weight, runtime_gather_output)
        if self.lora_a is None or self.lora_b is None or not self.adapter_enabled:
            return output, bias
        low = F.linear(self.adapter_input(input_), self.lora_a)
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(
                low, tensor_parallel_output_grad=True, group=self.tp_group
            )
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        return output + self.lora_scale * F.linear(low, self.lora_b), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """See the parent; B is split along its rows, by halves where the weight is."""
        state = _sharded_state(
            self, prefix, {"weight": 0, "bias": 0, "lora_b": 0}, sharded_offsets, metadata
        )
        key = f"{prefix}lora_b"
        if self._is_gate_and_up and key in state:
            state[key] = stored_by_halves(state[key], sharded_offsets, metadata)
        return state


class LoRARowParallelLinear(RowParallelLinear, LowRankAdapter):
    """A row-parallel layer: linear_proj, linear_fc2. Without adapter it is its parent."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._without_adapter()

    def local_columns(self, lora_a: Tensor) -> Tensor:
        """See `LowRankAdapter`."""
        return lora_a[:, self.first_input : self.first_input + self.input_size_per_partition]

    @property
    def first_input(self) -> int:
        """See `LowRankAdapter`."""
        return int(self.tp_group.rank() * self.input_size_per_partition)

    def _mark_shards(self, lora_a: Parameter, lora_b: Parameter) -> None:
        set_tensor_model_parallel_attributes(lora_a, True, 1, 1)
        lora_b.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """See the parent; [S of all ranks, 1, in / tp] -> [S, 1, out]."""
        output, bias = super().forward(input_)
        if self.lora_a is None or self.lora_b is None or not self.adapter_enabled:
            return output, bias
        low = F.linear(self.adapter_input(input_), self.lora_a)  # this rank's share of the sum
        if self.sequence_parallel and self.tp_group.size() > 1:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        return output + self.lora_scale * F.linear(low, self.lora_b), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """See the parent; A is split along its columns."""
        return _sharded_state(self, prefix, {"weight": 1, "lora_a": 1}, sharded_offsets, metadata)
