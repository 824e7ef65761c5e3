"""The experts of a layer that lie on this rank, all in one: SwiGLU networks without biases.

Weights are stacked, [experts, outputs, inputs], and multiplied by `grouped_linear`. Distributed
checkpoints hold them as Megatron's own kinds of experts write them, each expert a place on an axis
of its own: any of these, and any parallel layout, can read what another one wrote.

N: copies of tokens; L: experts of a rank; h: hidden size; f: inner size of a rank's part of an
expert; i, o: inputs and outputs of a layer; r: rank of adapters.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import Parameter

from megatron_dlm.megatron_internals import weighted_swiglu
from megatron_dlm.models.grouped_linear import grouped_linear
from megatron_dlm.models.lora_layers import LowRankAdapter
from megatron_dlm.models.swiglu import swiglu


class ExpertLinear(torch.nn.Module, LowRankAdapter):
    """A linear layer of every expert of a rank, split over the expert tensor-parallel group.

    Adapters are stacked like the weights, A [L, r, i] and B [L, o, r], and split like them: of
    linear_fc1 every rank has A whole, of linear_fc2 B. They are trained only where an expert lies
    on one process (`config.rules.model`): the gradient of what is whole is not summed.

    Args:
        num_experts: L.
        outputs: Of the whole layer.
        inputs: Of the whole layer.
        config: Of the model.
        groups: Process groups.
        joins_gate_and_up: Whether its outputs are those of two layers, split one by one:
            linear_fc1. Otherwise its inputs are split: linear_fc2.
        init_method: Fills a matrix with initial values.
    """

    def __init__(
        self,
        num_experts: int,
        outputs: int,
        inputs: int,
        *,
        config: TransformerConfig,
        groups: Any,
        joins_gate_and_up: bool,
        init_method: Callable[[Tensor], Any],
    ) -> None:
        super().__init__()
        self._groups = groups
        self._expert_parallel = config.expert_model_parallel_size > 1
        self._joins_gate_and_up = joins_gate_and_up
        self._whole_shape = outputs, inputs
        self._init_method = init_method
        self.tp_group = groups.expt_tp
        self.input_size = inputs
        self.first_expert = groups.ep.rank() * num_experts
        parts = self.tp_group.size()
        own = (outputs // parts, inputs) if joins_gate_and_up else (outputs, inputs // parts)
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = Parameter(
            torch.empty(num_experts, *own, dtype=config.params_dtype, device=device)
        )
        self._mark(self.weight)
        self._without_adapter()

    @property
    def splits_outputs(self) -> bool:
        """Whether ranks have parts of the outputs; else of the inputs."""
        return self._joins_gate_and_up

    def _mark(self, parameter: Parameter) -> None:
        """Tell Megatron how to reduce the gradient: each rank's values count, as shards."""
        parameter.allreduce = not self._expert_parallel  # type: ignore[attr-defined]
        axis, stride = (1, 2) if self._joins_gate_and_up else (2, 1)
        set_tensor_model_parallel_attributes(parameter, True, axis, stride)

    @torch.no_grad()
    def initialize_expert(self, expert: int) -> None:
        """Fill the matrix of an expert on the CPU, from one draw for the whole of it."""
        whole = torch.empty(self._whole_shape, dtype=torch.float32)
        self._init_method(whole)
        rank, parts = self.tp_group.rank(), self.tp_group.size()
        if self._joins_gate_and_up:
            own = torch.cat([half.chunk(parts)[rank] for half in whole.chunk(2)])
        else:
            own = whole.chunk(parts, dim=1)[rank]
        self.weight[expert].copy_(own)

    @torch.no_grad()
    def initialize(self) -> None:
        """Fill the matrices of all experts on the GPU."""
        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            self._init_method(self.weight)

    def local_columns(self, lora_a: Tensor) -> Tensor:
        """See `LowRankAdapter`."""
        if self.splits_outputs:
            return lora_a
        return lora_a.chunk(self.tp_group.size(), dim=-1)[self.tp_group.rank()]

    def _mark_shards(self, lora_a: Parameter, lora_b: Parameter) -> None:
        for parameter in (lora_a, lora_b):
            self._mark(parameter)

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Rows [N, i] of the experts, which end before the rows [L] of `ends` -> [N, o]."""
        output = grouped_linear(rows, self.weight, ends)
        if self.lora_a is None or self.lora_b is None or not self.adapter_enabled:
            return output
        low = grouped_linear(rows, self.lora_a, ends)
        return output + self.lora_scale * grouped_linear(low, self.lora_b, ends)

    def sharded_state(
        self, prefix: str, key_prefix: str, sharded_offsets: tuple[Any, ...]
    ) -> dict[str, ShardedTensorFactory]:
        """This rank's parameters for a distributed checkpoint, stored expert by expert.

        Args:
            prefix: Of the parameters' names in the model.
            key_prefix: Of their names in the checkpoint.
            sharded_offsets: Axes that come before that of the experts, as Megatron gives them.
        """
        split = {"weight": 0, "lora_b": 0} if self.splits_outputs else {"weight": 1, "lora_a": 1}
        return {
            f"{prefix}{name}": self._stored_by_expert(
                f"{key_prefix}{name}", parameter, sharded_offsets, split.get(name)
            )
            for name, parameter in self.named_parameters()
        }

    def _stored_by_expert(
        self, key: str, parameter: Parameter, offsets: tuple[Any, ...], split: int | None
    ) -> ShardedTensorFactory:
        axis, num_experts = len(offsets), self._groups.ep.size() * len(self.weight)
        rank, parts = (self.tp_group.rank(), self.tp_group.size()) if split is not None else (0, 1)
        # Gate and up are stored one after the other, each split over the ranks.
        has_halves = self._joins_gate_and_up and not key.endswith("lora_a")
        halves = 2 if has_halves else 1

        def build(key: str, values: Tensor, replica_id: Any, _: Any) -> list[ShardedTensor]:
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    part,
                    *offsets,
                    (axis, self.first_expert + expert, num_experts),
                    (axis + 1 + (split or 0), half * parts + rank, halves * parts),
                    replica_id=replica_id,
                    prepend_axis_num=axis + 1,
                )
                for expert, matrix in enumerate(values)
                for half, part in enumerate(matrix.chunk(halves))
            ]

        @torch.no_grad()
        def merge(loaded: list[Tensor]) -> Tensor:
            return torch.cat(loaded).view(parameter.shape)

        replica_id = (0, self.tp_group.rank() if split is None else 0, self._groups.expt_dp.rank())
        return ShardedTensorFactory(key, parameter, build, merge, replica_id)


class GroupedExperts(MegatronModule):
    """A rank's experts, in place of Megatron's, for `SortingTokenDispatcher`.

    Args:
        num_local_experts: L.
        config: Of the model.
        pg_collection: Process groups.
        name: Of the module, which newer versions of Megatron give it; not used.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: Any,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        assert config.moe_ffn_hidden_size is not None
        h, f = config.hidden_size, config.moe_ffn_hidden_size
        common: dict[str, Any] = dict(config=config, groups=pg_collection)
        self.linear_fc1 = ExpertLinear(
            num_local_experts,
            2 * f,
            h,
            joins_gate_and_up=True,
            init_method=config.init_method,
            **common,
        )
        self.linear_fc2 = ExpertLinear(
            num_local_experts,
            h,
            f,
            joins_gate_and_up=False,
            init_method=config.output_layer_init_method,
            **common,
        )
        if not config.perform_initialization:
            return
        layers = (self.linear_fc1, self.linear_fc2)
        if config.use_cpu_initialization:
            for expert in range(num_local_experts):
                for layer in layers:
                    layer.initialize_expert(expert)
        else:
            for layer in layers:
                layer.initialize()

    def forward(self, rows: Tensor, ends: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """Outputs of the experts, times the router's weights.

        Args:
            rows: Hidden states [N, h], those of an expert together, experts in order.
            ends: [L] int32, the row that each expert ends before.
            weights: [N].

        Returns:
            [N, h], and None for the bias that Megatron expects.
        """
        inner = self._activation(self.linear_fc1(rows, ends), weights[:, None])
        return self.linear_fc2(inner, ends), None

    def _activation(self, gate_and_up: Tensor, weights: Tensor) -> Tensor:
        """silu(gate) * up * weight: [N, 2 f] -> [N, f]."""
        if self.config.bias_activation_fusion:
            return weighted_swiglu(gate_and_up, weights)
        return (swiglu(gate_and_up) * weights).to(gate_and_up.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """See the parent."""
        state: dict[str, Any] = {}
        for name, layer in (("linear_fc1", self.linear_fc1), ("linear_fc2", self.linear_fc2)):
            state |= layer.sharded_state(
                f"{prefix}{name}.", f"{prefix}experts.{name}.", tuple(sharded_offsets)
            )
        return state
