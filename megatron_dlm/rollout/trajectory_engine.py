"""What training needs of whatever decodes its rollouts.

Two classes are that: `engine.RolloutEngine`, which decodes in the training processes with the
weights in place, and `external.engine.ServerRolloutEngine`, which asks servers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from megatron_dlm.parallel import ParallelGroups
    from megatron_dlm.rollout.cutoff import Cutoff
    from megatron_dlm.rollout.generation_config import GenerationConfig
    from megatron_dlm.rollout.work import RolloutWork
    from megatron_dlm.types.trajectory import Prompt, Trajectory


class TrajectoryEngine(Protocol):
    """Decodes prompts with the student's weights; all ranks make the same calls.

    Attributes:
        generation: Decoding settings of the next rollout; may be replaced between two.
        groups: Process groups of the student.
        work: Sizes of this replica's forwards so far; empty where others make them.
    """

    generation: GenerationConfig
    groups: ParallelGroups
    work: RolloutWork

    def generate_together(
        self,
        prompts: Sequence[Prompt],
        max_response_length: int,
        *,
        one_queue: bool,
        cutoff: Cutoff | None = None,
        on_finished: Callable[[Trajectory], None] | None = None,
    ) -> list[Trajectory]:
        """One response for each prompt, each on one replica; see `RolloutEngine`."""

    def settled(self) -> AbstractContextManager[None]:
        """Around `generate_together`: if one rank leaves it, all do."""
