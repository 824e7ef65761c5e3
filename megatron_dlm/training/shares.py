"""What each data-parallel rank has of an update, and sharing it by predicted cost.

Ranks wait for each other at the end of every update, so the one with the most to do decides how
long it takes. Only trajectories travel, before the teacher sees them: token ids, no hidden states.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_dlm.accounting.flops import BACKWARD, ForwardFlops, causal_pairs
from megatron_dlm.parallel import of_all_replicas
from megatron_dlm.training.run import Run
from megatron_dlm.types.trajectory import Trajectory


@dataclass(frozen=True)
class Share:
    """What one rank has of an update.

    Attributes:
        trajectories: At least one. Without a token budget all ranks have the same number: a rank
            with one fewer has a copy of another rank's trajectory at the end, which counts nowhere.
        num_own: Number of trajectories without that copy.
    """

    trajectories: list[Trajectory]
    num_own: int

    @property
    def own(self) -> list[Trajectory]:
        """The trajectories without the copy."""
        return self.trajectories[: self.num_own]


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


def balanced(run: Run, shares: Sequence[Share]) -> list[Share]:
    """The same updates, each shared by cost; all ranks call this.

    A rank that gets nothing has a copy of the update's first trajectory, to run empty rows like it.

    Args:
        run: Has models and objective, which decide the cost.
        shares: This rank's share of each update.
    """
    groups = run.groups
    if groups.dp is None:
        return list(shares)
    costs = [[(t.sample_index, _cost(run, t)) for t in share.own] for share in shares]
    of_ranks: list[list[list[tuple[int, int]]]] = [[] for _ in range(groups.dp_size)]
    torch.distributed.all_gather_object(of_ranks, costs, group=groups.dp)
    wanted: list[list[int]] = []  # of this rank, in each update
    num_own = []
    moved: dict[int, Trajectory] = {}  # from this rank to others
    for update, share in enumerate(shares):
        items = sorted(
            (index, cost, rank)
            for rank, updates in enumerate(of_ranks)
            for index, cost in updates[update]
        )
        owners = share_by_cost([cost for _, cost, _ in items], groups.dp_size)
        shared: list[list[int]] = [[] for _ in range(groups.dp_size)]
        travels = set()
        for (index, _, rank), owner in zip(items, owners, strict=True):
            shared[owner].append(index)
            if owner != rank:
                travels.add(index)
        if not all(shared):
            travels.add(items[0][0])
        moved |= {t.sample_index: t for t in share.own if t.sample_index in travels}
        own = shared[groups.dp_rank]
        num_own.append(len(own))
        wanted.append(own or [items[0][0]])
    at_hand = {t.sample_index: t for share in shares for t in share.own}
    at_hand |= {t.sample_index: t for t in of_all_replicas(list(moved.values()), groups)}
    return [
        Share([at_hand[index] for index in indices], number)
        for indices, number in zip(wanted, num_own, strict=True)
    ]


def _cost(run: Run, trajectory: Trajectory) -> int:
    """FLOPs of one update on a trajectory, all of the last layer and teacher's forward included."""
    architecture = run.inputs.architecture
    tokens, pairs, logits = run.objective.expected_size(trajectory)
    flops = ForwardFlops.of(architecture).forward(tokens, pairs, logits) * (1 + BACKWARD)
    if run.teacher is None or run.teacher.model is None:
        return flops
    if run.inputs.teacher is not None:
        architecture = run.inputs.teacher.source.architecture
    if not run.config.traits.self_distillation:  # causal, over x_0
        tokens = len(trajectory.token_ids)
        pairs = causal_pairs(tokens)
    return flops + ForwardFlops.of(architecture).forward(tokens, pairs, logits)
