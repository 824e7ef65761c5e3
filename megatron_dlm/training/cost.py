"""Predicted cost of a trajectory's training, and sharing an update by it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from megatron_dlm.models.architecture import Architecture, active_parameters


@dataclass(frozen=True)
class ForwardCost:
    """FLOPs of a forward: two for each parameter and token, four for each number of a seen pair.

    Attributes:
        of_token: Per token.
        of_pair: Per query and key that it sees, over all layers and heads.
    """

    of_token: float
    of_pair: float

    @classmethod
    def of(cls, architecture: Architecture) -> Self:
        """That of a model."""
        width = architecture.num_attention_heads * architecture.kv_channels
        return cls(2.0 * active_parameters(architecture), 4.0 * architecture.num_layers * width)

    def __call__(self, tokens: int, pairs: int) -> float:
        """FLOPs of a text."""
        return self.of_token * tokens + self.of_pair * pairs


def share_by_cost(costs: Sequence[float], ranks: int) -> list[int]:
    """Give each item to a rank so that all have about as much to do; the rank of each item.

    The dearest first, each to the rank with the least so far (Graham 1969: the dearest rank has at
    most 4/3 - 1 / (3 ranks) of the least possible).

    Args:
        costs: Cost of each item.
        ranks: Number of ranks.
    """
    loads = [(0.0, 0, rank) for rank in range(ranks)]  # cost, items
    owner = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, items, rank = min(loads)
        owner[item] = rank
        loads[rank] = (load + costs[item], items + 1, rank)
    return owner
