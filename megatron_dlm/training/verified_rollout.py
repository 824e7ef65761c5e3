"""Rollouts that are repeated until the answer is right."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_dlm import platform
from megatron_dlm.evaluation.rewards import RIGHT, Reward
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.types.trajectory import Prompt, Trajectory

# Noise is keyed by the sample index: later tries use indices that no run ever reaches.
TRY_STRIDE = 1 << 40


@dataclass(frozen=True)
class Verifier:
    """Marks responses as right or wrong, with the same result on all ranks of a model replica.

    Attributes:
        reward: Decides what is right.
        tokenizer: Decodes responses.
        max_tries: Most responses to a prompt.
        groups: Process groups of the student.
    """

    reward: Reward
    tokenizer: PreTrainedTokenizerBase
    max_tries: int
    groups: ParallelGroups

    def verify(self, trajectories: Sequence[Trajectory]) -> None:
        """Set `correct` of each trajectory; all ranks of the replica call this with the same."""
        group = self.groups.model
        verdicts = torch.zeros(len(trajectories), dtype=torch.int32, device=platform.device())
        if group is None or group.rank() == 0:
            texts = [
                str(self.tokenizer.decode(t.response_ids.tolist(), skip_special_tokens=True))
                for t in trajectories
            ]
            rewards = self.reward.rate([t.record for t in trajectories], texts)
            for i, reward in enumerate(rewards):
                verdicts[i] = reward >= RIGHT
        if group is not None:
            dist.broadcast(verdicts, group=group, group_src=0)
        for trajectory, verdict in zip(trajectories, verdicts.tolist(), strict=True):
            trajectory.correct = bool(verdict)


def generate_until_right(
    engine: RolloutEngine, prompts: Sequence[Prompt], max_response_length: int, verifier: Verifier
) -> list[Trajectory]:
    """Answer each prompt, again with other noise while the answer is wrong; all ranks call this.

    Args:
        engine: The rollout engine.
        prompts: Prompts of this data-parallel rank.
        max_response_length: In tokens.
        verifier: Decides what is right, and how often to try.

    Returns:
        The last response to each prompt, in their order; wrong ones are marked as such.

    Raises:
        StopRequested: On all ranks.
    """
    latest: list[Trajectory | None] = [None] * len(prompts)
    pending = list(range(len(prompts)))
    for number in range(verifier.max_tries):
        # Ranks that share experts run equally many forwards: none stops before the others.
        if not _any_rank(bool(pending), verifier.groups):
            break
        again = [
            replace(prompts[i], sample_index=prompts[i].sample_index + number * TRY_STRIDE)
            for i in pending
        ]
        with engine.settled():
            trajectories = engine.generate(again, max_response_length)
        verifier.verify(trajectories)
        for i, trajectory in zip(pending, trajectories, strict=True):
            trajectory.sample_index = prompts[i].sample_index
            trajectory.tries = number + 1
            latest[i] = trajectory
        pending = [i for i in pending if not _is_right(latest[i])]
    return [trajectory for trajectory in latest if trajectory is not None]


def _is_right(trajectory: Trajectory | None) -> bool:
    return trajectory is not None and bool(trajectory.correct)


def _any_rank(works: bool, groups: ParallelGroups) -> bool:
    if groups.dp is None:
        return works
    flag = torch.tensor([int(works)], device=platform.device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=groups.dp)
    return bool(platform.to_host(flag).item())
