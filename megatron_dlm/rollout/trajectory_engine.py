"""What training needs of whatever decodes its rollouts.

Two classes are that: `engine.RolloutEngine`, which decodes in the training processes with the
weights in place, and `external.engine.ServerRolloutEngine`, which asks servers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

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


@runtime_checkable
class AheadEngine(TrajectoryEngine, Protocol):
    """An engine that decodes a rollout while the student is trained; all ranks call each method."""

    @property
    def is_ahead(self) -> bool:
        """Whether a rollout was begun that nobody has waited for."""

    def begin(self, prompts: Sequence[Prompt], max_response_length: int) -> None:
        """Begin a rollout with the weights of now; the next `generate_together` waits for it."""

    def ahead(self, *, waits: bool) -> list[Trajectory]:
        """This replica's part of a rollout that was begun, if it has come; else none."""

    def take_up(self, trajectories: Sequence[Trajectory], max_response_length: int) -> None:
        """Take trajectories of all ranks for those of a rollout that was begun."""

    def give_up(self) -> None:
        """Forget the rollout that was begun, if there is one."""

    def close(self) -> None:
        """At the end of a run, however it ends; of this rank alone."""
