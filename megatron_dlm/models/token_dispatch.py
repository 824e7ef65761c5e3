"""Tokens to their experts and back, sorted on the device.

Each token is copied once for every expert that the router chose for it. The copies are sorted by
expert, and what the experts return is put back by the inverse of that order and added up: two
gathers and a sum, each the other's gradient, with the same result on every run.

On one process nothing of this is known to the host. Across processes there are two ways. An
exchange (all-to-all) moves only what an expert needs, but the host has to learn how much that is:
one copy to the host a layer. Gathering gives every rank all tokens, without a word to the host; it
is for forwards without gradients whose rows are few and equally long (`rows_of_equal_length`), as
those of decoding are. A process that has a part of each of its experts (expert tensor parallelism)
counts as one that has experts of its own, whose outputs are parts of the sum.

T: tokens of this rank; k: experts of a token; h: hidden size; R: ranks that share the experts; E:
experts; L: experts of a rank; N: copies that a rank's experts get.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.token_dispatcher import (
    MoEFlexTokenDispatcher,
    MoETokenDispatcher,
)
from torch import Tensor

from megatron_dlm import platform

MAX_GATHERED_COPIES = 2**16
"""Copies of tokens up to which gathering them on every rank is worth an exchange saved."""

_equally_long = False


@contextmanager
def rows_of_equal_length() -> Iterator[None]:
    """Around a forward without gradients whose rows have the same length on all ranks."""
    global _equally_long
    before, _equally_long = _equally_long, True
    try:
        yield
    finally:
        _equally_long = before


def can_gather(tokens: int, ranks: int, experts_per_token: int) -> bool:
    """Whether rows of so many tokens on each of so many ranks are few enough to be gathered."""
    return tokens * ranks * experts_per_token <= MAX_GATHERED_COPIES


@dataclass(frozen=True)
class _Order:
    """An order of copies by group.

    Attributes:
        order: [N] by place in the order: number of the copy.
        source: [N] by place in the order: which row it is a copy of.
        place: [N] by copy (those of a row together): its place in the order.
        copies: Of each row.
        sorted_groups: [N] groups in order.
        ends: [groups] int32, the place that each group ends before.
    """

    order: Tensor
    source: Tensor
    place: Tensor
    copies: int
    sorted_groups: Tensor
    ends: Tensor

    @classmethod
    def by(cls, groups: Tensor, num_groups: int) -> "_Order":
        """Sort by group [rows, copies]; groups from `num_groups` on come last."""
        copies = groups.shape[1]
        sorted_groups, order = groups.flatten().sort(stable=True)
        numbers = torch.arange(num_groups, device=groups.device)
        return cls(
            order=order,
            source=order if copies == 1 else order // copies,
            place=order.argsort(),
            copies=copies,
            sorted_groups=sorted_groups,
            ends=torch.searchsorted(sorted_groups, numbers, right=True, out_int32=True),
        )

    def spread(self, rows: Tensor) -> Tensor:
        """Rows [rows, h] -> copies in order [N, h]."""
        spread: Tensor = _Spread.apply(rows, self)
        return spread

    def collect(self, copies: Tensor) -> Tensor:
        """Copies in order [N, h] -> the sum over those of each row [rows, h]."""
        collected: Tensor = _Collect.apply(copies, self)
        return collected


def _collected(copies: Tensor, order: _Order) -> Tensor:
    rows = copies.index_select(0, order.place)
    return rows if order.copies == 1 else rows.view(-1, order.copies, rows.shape[1]).sum(1)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: _Order) -> Tensor:
        ctx.order = order
        return rows.index_select(0, order.source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _collected(grad, ctx.order), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, copies: Tensor, order: _Order) -> Tensor:
        ctx.order = order
        return _collected(copies, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.order.source), None


def read_sizes(sizes: Tensor) -> list[list[int]]:
    """Sizes of messages [R, R] on the host: the only time that it waits for the device."""
    values: list[list[int]] = platform.to_host(sizes).tolist()
    return values


class SortingTokenDispatcher(MoETokenDispatcher):
    """Sends tokens to the experts that `TorchTopKRouter` chose.

    Its methods are called in the order in which they stand here. The experts get the row that each
    of them ends before, in place of Megatron's counts.

    Args:
        num_local_experts: L.
        local_expert_indices: Numbers of this rank's experts in the layer.
        config: Of the model.
        pg_collection: Process groups.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: Any,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self._local = num_local_experts
        self._first = local_expert_indices[0]
        self._experts = num_local_experts * self.ep_size
        self._ranks = self.tp_size * self.ep_size

    def dispatch_preprocess(
        self, tokens: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sort this rank's tokens, unless all ranks' are going to be gathered.

        Args:
            tokens: Hidden states [S, 1, h], T = S.
            routing_map: Chosen experts [T, k].
            probs: Their weights [T, k].

        Returns:
            Copies to send and their weights; tokens and weights where they are gathered.
        """
        self._shape, chosen = tokens.shape, routing_map
        tokens = tokens.reshape(-1, self._shape[-1])
        self._gathers = (
            self._ranks > 1
            and _equally_long
            and not torch.is_grad_enabled()
            and can_gather(len(tokens), self._ranks, chosen.shape[1])
        )
        if self._gathers:
            self._chosen = chosen
            return tokens, probs
        if self.tp_size > 1:
            # Every process of an expert's tensor-parallel group gets a copy of the token.
            parts = torch.arange(self.tp_size, device=chosen.device)
            owner = (chosen // self._local * self.tp_size)[..., None] + parts
            chosen = (owner * self._local + (chosen % self._local)[..., None]).flatten(1)
            probs = probs[..., None].expand(-1, -1, self.tp_size).flatten(1)
        self._home = _Order.by(chosen, self._ranks * self._local)
        return self._home.spread(tokens), probs.flatten().index_select(0, self._home.order)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Exchange or gather them over the ranks that share the experts."""
        if self._ranks == 1:
            return hidden_states, probs
        group = self.tp_ep_group
        if self._gathers:
            self._chosen = gather_from_sequence_parallel_region(self._chosen, group=group)
            probs = gather_from_sequence_parallel_region(probs, group=group)
            return gather_from_sequence_parallel_region(hidden_states, group=group), probs
        counts = self._home.ends.diff(prepend=self._home.ends.new_zeros(1))
        every = gather_from_sequence_parallel_region(counts, group=group)
        every = every.view(self._ranks, self._ranks, self._local)  # [from, to, expert]
        sizes, own = read_sizes(every.sum(2)), group.rank()
        self._sent, self._received = sizes[own], [row[own] for row in sizes]
        self._received_counts = every[:, own]
        exchanged = [
            all_to_all(group, part, self._received, self._sent) for part in (hidden_states, probs)
        ]
        return exchanged[0], exchanged[1]

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sort what has arrived by this rank's experts.

        Returns:
            Copies [N, h], the row [L] that each expert ends before, and weights [N].
        """
        if self._ranks == 1:
            return hidden_states, self._home.ends, probs
        if self._gathers:
            # This rank's experts become 0 to L - 1, the others larger numbers.
            groups = (self._chosen - self._first) % self._experts
            weights = probs.flatten()
        else:
            experts = torch.arange(self._local, device=hidden_states.device).repeat(self._ranks)
            counts, total = self._received_counts.flatten(), sum(self._received)
            groups = experts.repeat_interleave(counts, output_size=total)[:, None]
            weights = probs
        self._here = _Order.by(groups, self._local)
        weights = weights.index_select(0, self._here.order)
        return self._here.spread(hidden_states), self._here.ends, weights

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Undo the order of `dispatch_postprocess`, outputs of the experts [N, h]."""
        if self._ranks == 1:
            return hidden_states
        if self._gathers:
            elsewhere = self._here.sorted_groups >= self._local
            hidden_states = hidden_states.masked_fill(elsewhere[:, None], 0.0)
        return self._here.collect(hidden_states)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Send each rank what belongs to its tokens."""
        if self._ranks == 1:
            return hidden_states
        if self._gathers:
            group = self.tp_ep_group
            output: Tensor = reduce_scatter_to_sequence_parallel_region(hidden_states, group=group)
        else:
            output = all_to_all(self.tp_ep_group, hidden_states, self._sent, self._received)
        return output

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Add up what has come back for each token: [S, 1, h]."""
        output = hidden_states if self._gathers else self._home.collect(hidden_states)
        return output.view(self._shape)


class DeepEPTokenDispatcher(MoEFlexTokenDispatcher):
    """Megatron's dispatcher with DeepEP's kernels, for experts that want to know where they end."""

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `SortingTokenDispatcher`."""
        copies, counts, weights = super().dispatch_postprocess(hidden_states, probs)
        ends = counts.cumsum(0).to(copies.device, torch.int32, non_blocking=True)
        return copies, ends, weights
