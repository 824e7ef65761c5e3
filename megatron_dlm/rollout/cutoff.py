"""Where a rollout leaves its longest responses unfinished, for a later one to go on with.

Time is counted in denoising forwards of each sequence, as if all had started together. So what is
kept depends neither on the layout nor on which replica is faster: a rollout that waits for n
responses ends at the number of forwards that the n-th of them took, and of all others only what was
decoded in as many is kept.
"""

from collections.abc import Collection

import torch

from megatron_dlm.rollout.replica_board import ReplicaBoard
from megatron_dlm.types.trajectory import Prompt, Trajectory

STEPS_BETWEEN_READINGS = 8
"""Steps of a replica after which it learns what others have finished."""


class Cutoff:
    """Knows after how many forwards sequences stop, as soon as enough of them have finished.

    All ranks of a replica make the same calls.

    Args:
        wanted: Responses that have to finish.
        exempt: Sample indices of responses that finish besides these, however long they take.
        board: Shared with other replicas, of this rollout alone; None without any.
    """

    def __init__(self, wanted: int, exempt: Collection[int], board: ReplicaBoard | None) -> None:
        self._wanted = wanted
        self._exempt = exempt
        self._board = board
        self._taken: list[int] = []
        self._steps = 0
        self._limit: int | None = None

    def spares(self, prompt: Prompt) -> bool:
        """Whether a response is decoded to its end."""
        return prompt.sample_index in self._exempt

    def finished(self, prompt: Prompt, trajectory: Trajectory) -> None:
        """Take note of a response that has ended on this replica."""
        if self.spares(prompt):
            return
        forwards = forwards_of_rollout(trajectory, prompt.beginning)
        if self._board is None:
            self._taken.append(forwards)
        else:
            self._board.note(forwards)

    def limit(self) -> int | None:
        """After a step: forwards after which sequences stop, as far as is known; None: no limit.

        It never grows, and ends as the limit of all responses of all replicas.
        """
        if self._board is None:
            self._limit = self._known()
        elif self._steps % STEPS_BETWEEN_READINGS == 0:
            limit = self._board.agreed(self._read)
            self._limit = None if limit < 0 else limit
        self._steps += 1
        return self._limit

    def close(self) -> None:
        """At the end, after all replicas have met."""
        if self._board is not None:
            self._board.close()

    def _read(self) -> int:
        assert self._board is not None
        self._taken += self._board.new_notes()
        limit = self._known()
        return -1 if limit is None else limit

    def _known(self) -> int | None:
        if self._wanted == 0:
            return 0
        if len(self._taken) < self._wanted:
            return None
        return sorted(self._taken)[self._wanted - 1]


def forwards_of_rollout(trajectory: Trajectory, beginning: Trajectory | None) -> int:
    """Denoising forwards of a trajectory in the rollout that went on with a beginning."""
    before = 0 if beginning is None else beginning.denoising_forwards
    return trajectory.denoising_forwards - before


def cut(
    trajectory: Trajectory, beginning: Trajectory | None, forwards: int, block_size: int
) -> Trajectory:
    """The blocks of a trajectory that were complete after some forwards of its last rollout.

    Args:
        trajectory: Finished later than that, or not at all.
        beginning: What it had before that rollout.
        forwards: Denoising forwards of the rollout.
        block_size: Tokens of a block, counted from the first prompt token.
    """
    tokens = torch.cat((trajectory.response_ids, trajectory.tail_ids))
    steps = torch.cat((trajectory.unmask_step, trajectory.tail_unmask_step))
    positions = len(trajectory.prompt_ids) + torch.arange(len(tokens))
    block = positions // block_size - len(trajectory.prompt_ids) // block_size
    # Each step of a block commits a token: its last one is the number of its forwards.
    taken = torch.zeros(int(block[-1]) + 1 if len(block) else 0, dtype=torch.int64)
    taken.scatter_reduce_(0, block, steps, "amax")
    allowed = forwards + (0 if beginning is None else beginning.denoising_forwards)
    kept = int((taken.cumsum(0) <= allowed).sum())
    length = int((block < kept).sum())
    denoising = int(taken[:kept].sum())
    return Trajectory(
        sample_index=trajectory.sample_index,
        prompt_ids=trajectory.prompt_ids,
        response_ids=tokens[:length],
        unmask_step=steps[:length],
        finish_reason="unfinished",
        denoising_forwards=denoising,
        total_forwards=denoising + trajectory.total_forwards - trajectory.denoising_forwards,
        rollouts=trajectory.rollouts,
        record=trajectory.record,
    )
