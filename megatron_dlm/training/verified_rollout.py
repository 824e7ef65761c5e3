"""Rollouts that are repeated until the answer is right."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_dlm import platform
from megatron_dlm.evaluation.rewards import RIGHT, Reward
from megatron_dlm.parallel import ParallelGroups, of_all_replicas
from megatron_dlm.rollout.trajectory_engine import TrajectoryEngine
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
    engine: TrajectoryEngine,
    prompts: Sequence[Prompt],
    max_response_length: int,
    verifier: Verifier,
    *,
    one_queue: bool,
) -> list[Trajectory]:
    """Answer each prompt, again with other noise while the answer is wrong.

    All ranks call this, with the same prompts.

    Args:
        engine: The rollout engine.
        prompts: What to answer.
        max_response_length: In tokens.
        verifier: Decides what is right, and how often to try.
        one_queue: See `RolloutEngine.generate_together`.

    Returns:
        The last responses to the prompts that this replica gave, in the order of the prompts; wrong
        ones are marked as such.

    Raises:
        StopRequested: On all ranks.
    """
    latest: dict[int, Trajectory] = {}
    pending = {prompt.sample_index: prompt for prompt in prompts}
    for number in range(verifier.max_tries):
        if not pending:
            break
        # The next response to it may be another replica's.
        latest = {sample: t for sample, t in latest.items() if sample not in pending}
        again = [
            replace(prompt, sample_index=sample + number * TRY_STRIDE)
            for sample, prompt in pending.items()
        ]
        with engine.settled():
            trajectories = engine.generate_together(again, max_response_length, one_queue=one_queue)
        verifier.verify(trajectories)
        for trajectory in trajectories:
            trajectory.sample_index -= number * TRY_STRIDE
            trajectory.tries = number + 1
            latest[trajectory.sample_index] = trajectory
        wrong = [t.sample_index for t in trajectories if not t.correct]
        pending = {sample: pending[sample] for sample in of_all_replicas(wrong, verifier.groups)}
    return [latest[p.sample_index] for p in prompts if p.sample_index in latest]
