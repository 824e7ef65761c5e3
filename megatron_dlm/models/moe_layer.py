"""Router and layer of a mixture of experts without Transformer Engine."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_dlm.megatron_internals import expert_groups
from megatron_dlm.models.experts import GroupedExperts
from megatron_dlm.models.token_dispatch import DeepEPTokenDispatcher, SortingTokenDispatcher

_ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class TorchTopKRouter(TopKRouter):
    """Megatron's router with its gate computed by PyTorch.

    The gate that it replaces asks for a kernel of Transformer Engine by a name that is defined only
    where that is installed.
    """

    def gating(self, input: Tensor) -> Tensor:
        """Router logits [..., E] of hidden states [..., h], in `moe_router_dtype`."""
        dtype = _ROUTER_DTYPES.get(self.config.moe_router_dtype, input.dtype)
        return F.linear(input.to(dtype), self.weight.to(dtype))


class SparseTopKRouter(TorchTopKRouter):
    """The same router for a dispatcher that wants a token's experts, not a table of all experts."""

    def routing(self, logits: Tensor, padding_mask: Any = None) -> tuple[Tensor, Tensor]:
        """Choose the experts with the largest probabilities.

        Args:
            logits: [..., E].
            padding_mask: None; there is no balancing loss that it could matter to.

        Returns:
            Weights and numbers of the chosen experts, [T, k] each.
        """
        logits = logits.view(-1, self.config.num_moe_experts)
        if self.config.moe_router_pre_softmax:
            weights, chosen = logits.softmax(-1).topk(self.topk, dim=1)
        else:
            largest, chosen = logits.topk(self.topk, dim=1)
            weights = largest.softmax(-1)
        return weights, chosen


class GroupedMoELayer(MoELayer):
    """Megatron's layer with `GroupedExperts`, and a router and a dispatcher for them.

    Args:
        config: Of the model.
        layer_number: Of the layer, from 1.
        pg_collection: Process groups; None: Megatron's.
        further: What newer versions of Megatron give each layer, its name for one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int | None = None,
        pg_collection: Any = None,
        **further: Any,
    ) -> None:
        groups = pg_collection or expert_groups()
        is_flex = config.moe_token_dispatcher_type == "flex"
        router = TorchTopKRouter if is_flex else SparseTopKRouter
        submodules = MoESubmodules(experts=GroupedExperts, router=router)
        super().__init__(config, submodules, layer_number, groups, **further)
        self.token_dispatcher = (DeepEPTokenDispatcher if is_flex else SortingTokenDispatcher)(
            self.num_local_experts, self.local_expert_indices, config, groups
        )
