"""What a rollout has finished, what it leaves for the next one, and which replica trains on what.

Replicas decode what they come to; they train on what is theirs in the order of the samples. So
every update is of the same trajectories under every layout, whoever decoded them.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from megatron_dlm.parallel import ParallelGroups, of_all_replicas
from megatron_dlm.rollout.cutoff import cut, forwards_of_rollout
from megatron_dlm.types.trajectory import Prompt, Trajectory


@dataclass(frozen=True)
class Leftovers:
    """What a rollout leaves for the next one; the same on all ranks.

    Attributes:
        by_sample: Responses that are not finished, or have not been trained on yet, by sample
            index, ascending.
        last_time: Those that have to finish in the next rollout.
    """

    by_sample: Mapping[int, Trajectory] = field(default_factory=dict)
    last_time: Collection[int] = ()

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory], max_rollouts: int) -> "Leftovers":
        """Those of a rollout.

        Args:
            trajectories: Left by it.
            max_rollouts: That may decode a response.
        """
        ordered = sorted(trajectories, key=lambda t: t.sample_index)
        return cls(
            {t.sample_index: t for t in ordered},
            {
                t.sample_index
                for t in ordered
                if not t.is_finished and t.rollouts + 1 >= max_rollouts
            },
        )


NO_LEFTOVERS = Leftovers()


class Selection(NamedTuple):
    """What of a rollout is trained on; the same on all ranks.

    Attributes:
        trained: Sample indices, ascending.
        left: Those of the other samples, ascending.
        forwards: Denoising forwards of this rollout that are kept of these at most.
    """

    trained: list[int]
    left: list[int]
    forwards: int


def select(
    forwards: Mapping[int, int], finished: Collection[int], last_time: Collection[int], wanted: int
) -> Selection:
    """Choose the responses that took fewest forwards, besides those that cannot wait.

    Args:
        forwards: Denoising forwards that this rollout took for each sample.
        finished: Samples whose response has ended.
        last_time: Samples that are trained on in any case.
        wanted: Number of samples to train on.
    """
    others = sorted(
        (number, sample)
        for sample, number in forwards.items()
        if sample in finished and sample not in last_time
    )
    chosen = others[: wanted - len(last_time)]
    trained = sorted([*last_time, *(sample for _, sample in chosen)])
    left = sorted(forwards.keys() - set(trained))
    return Selection(trained, left, max((number for number, _ in chosen), default=0))


def share_of(samples: Sequence[int], replica: int, replicas: int) -> tuple[list[int], int]:
    """The samples that a replica trains on, and how many of them are its own.

    Where the number of samples is no multiple of the replicas, the last ones have a copy of a
    sample that is another's, which counts nowhere.
    """
    own = list(samples[replica::replicas])
    return own + list(samples[: -(-len(samples) // replicas) - len(own)]), len(own)


@dataclass(frozen=True)
class RolledOut:
    """A rollout, selected and shared.

    Attributes:
        trajectories: That this replica trains on, `num_own` of its own first (`share_of`).
        num_own: See there.
        leftovers: For the next rollout; the same on all ranks.
        decoded_tokens: Response tokens that this replica decoded.
    """

    trajectories: list[Trajectory]
    num_own: int
    leftovers: list[Trajectory]
    decoded_tokens: int


def selected_and_shared(
    held: Sequence[Trajectory],
    before: Leftovers,
    wanted: int,
    *,
    block_size: int,
    groups: ParallelGroups,
    prompt_of: Callable[[int], Prompt],
) -> RolledOut:
    """Choose what is trained on, and give each replica its share; all ranks call this.

    Args:
        held: Trajectories of this replica.
        before: What the rollout began with.
        wanted: Samples to train on; there are at least as many.
        block_size: Tokens of a block.
        groups: Process groups.
        prompt_of: The prompt of a sample.
    """
    begun = before.by_sample

    def state(trajectory: Trajectory) -> tuple[int, int, bool]:
        sample = trajectory.sample_index
        forwards = forwards_of_rollout(trajectory, begun.get(sample))
        return sample, forwards, trajectory.is_finished

    states = of_all_replicas([state(trajectory) for trajectory in held], groups)
    selection = select(
        {sample: forwards for sample, forwards, _ in states},
        {sample for sample, _, is_finished in states if is_finished},
        before.last_time,
        wanted,
    )
    left = set(selection.left)
    kept = {}
    for trajectory in held:
        sample, forwards, is_finished = state(trajectory)
        if sample in left and not (is_finished and forwards <= selection.forwards):
            trajectory = cut(trajectory, begun.get(sample), selection.forwards, block_size)
        kept[sample] = trajectory
    shares = [  # ranks of a context-parallel group have the same one
        share_of(selection.trained, replica // groups.cp_size, groups.dp_size)[0]
        for replica in range(groups.num_replicas)
    ]
    elsewhere = set(selection.left).union(
        *(share for replica, share in enumerate(shares) if replica != groups.replica)
    )
    at_hand = dict(kept)
    if groups.replicas is not None:
        # Prompts are at hand everywhere, and their records may be long.
        nothing = torch.empty(0, dtype=torch.int64)
        sent = [
            replace(trajectory, prompt_ids=nothing, record={})
            for sample, trajectory in kept.items()
            if sample in elsewhere
        ]
        for trajectory in of_all_replicas(sent, groups):
            if trajectory.sample_index not in kept:
                prompt = prompt_of(trajectory.sample_index)
                at_hand[trajectory.sample_index] = replace(
                    trajectory, prompt_ids=prompt.token_ids, record=prompt.record
                )
    mine, num_own = share_of(selection.trained, groups.dp_rank, groups.dp_size)
    return RolledOut(
        [at_hand[sample] for sample in mine],
        num_own,
        [at_hand[sample] for sample in selection.left],
        sum(
            len(t.response_ids) - (len(begun[s].response_ids) if s in begun else 0)
            for s, t in kept.items()
            if t.is_rollout
        ),
    )
