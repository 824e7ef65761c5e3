"""Rollouts by servers: prompts go out over HTTP, trajectories come back.

The servers decode with the weights that they were sent last. Before a rollout this engine sends
the student's, if they have changed since. It can begin a rollout while the student is trained on
the one before (`begin`): what comes back then is of the weights as they were at that time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist

from megatron_dlm.activity import ACTIVITY
from megatron_dlm.errors import UserError
from megatron_dlm.parallel import ParallelGroups, errors_on_all_ranks, from_rank_zero
from megatron_dlm.rollout.cutoff import Cutoff
from megatron_dlm.rollout.external.client import RolloutServer
from megatron_dlm.rollout.external.flight import Flight
from megatron_dlm.rollout.external.responses import request, trajectory_of
from megatron_dlm.rollout.external.settings import check_settings
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.work import RolloutWork
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Prompt, Trajectory

POLL_SECONDS = 0.2
"""Between two looks of all ranks at whether a rollout has come, and whether one shall stop."""


class WeightSender(Protocol):
    """Brings the student's weights to the servers; all ranks make the same calls."""

    @property
    def version(self) -> int:
        """Of the student's weights now: the optimizer updates that made them."""

    def send(self, servers: Sequence[RolloutServer]) -> None:
        """Replace the weights of the servers, under the name of this version.

        Raises:
            UserError: On all ranks: a server does not take them.
        """


@dataclass(frozen=True)
class ServerLimits:
    """What a run asks of servers.

    Attributes:
        concurrency: Requests at once, of each replica for each server.
        longest: Tokens of the longest prompt and response, in whole blocks.
        needs_steps: Whether training goes back to the states that decoding visited.
    """

    concurrency: int
    longest: int
    needs_steps: bool


class ServerRolloutEngine:
    """Decodes prompts by servers; see `TrajectoryEngine`.

    Args:
        servers: At least one; the prompts of a rollout are spread over all of them.
        weights: Sends the student's weights.
        description: Of the run (`settings.described`), which each server is compared with.
        generation: Decoding settings of the run.
        special_tokens: Of the run.
        seed: Of the draws.
        groups: Process groups of the student.
        limits: What is asked for.
        stop: A request to stop ends a rollout; None: never.

    Attributes:
        generation: Decoding settings of the next rollout.
        groups: As passed.
        work: Empty: the forwards are the servers'.
    """

    def __init__(
        self,
        servers: Sequence[RolloutServer],
        weights: WeightSender,
        *,
        description: dict[str, Any],
        generation: GenerationConfig,
        special_tokens: SpecialTokens,
        seed: int,
        groups: ParallelGroups,
        limits: ServerLimits,
        stop: StopAgreement | None = None,
    ) -> None:
        self.generation = generation
        self.groups = groups
        self.work = RolloutWork()
        self._servers = servers
        self._weights = weights
        self._description = description
        self._special_tokens = special_tokens
        self._seed = seed
        self._limits = limits
        self._stop = stop
        self._sent: int | None = None
        self._is_checked = False
        self._ahead: tuple[list[tuple[int, int]], Flight] | None = None

    def check(self) -> None:
        """Compare every server's settings with the run's, once; all ranks call this.

        Raises:
            UserError: On all ranks: one differs, or a server is not there.
        """
        if not self._is_checked:
            from_rank_zero(self._check)
            self._is_checked = True

    def _check(self) -> None:
        for server in self._servers:
            has_steps = check_settings(
                server, self._description, self.generation.temperature, self._limits.longest
            )
            if self._limits.needs_steps and not has_steps:
                raise server.refuse(
                    "does not say at which step a token was kept, and the objective trains on the "
                    "states that decoding visited",
                    "choose --objective opdlm_off, or take megatron-dlm rollout-server",
                )

    def begin(self, prompts: Sequence[Prompt], max_response_length: int) -> None:
        """Send the weights if they have changed, and begin a rollout; all ranks call this.

        The next `generate_together`, of the same prompts, waits for it.

        Args:
            prompts: Of all ranks, the same on all of them.
            max_response_length: Tokens.

        Raises:
            UserError: On all ranks: a server does not take the weights.
        """
        self.check()
        if self._sent != self._weights.version:
            self._weights.send(self._servers)
            self._sent = self._weights.version
        key = _key(prompts, max_response_length)
        own = prompts[self.groups.replica :: self.groups.num_replicas]
        if not self.groups.is_first_of_replica:
            own = []
        version, limits = self._sent, [p.response_limit(max_response_length) for p in own]
        bodies = [
            request(prompt, limit, self.generation, self._special_tokens, self._seed)
            for prompt, limit in zip(own, limits, strict=True)
        ]

        def read(server: RolloutServer, number: int, answer: dict[str, Any]) -> Trajectory:
            return trajectory_of(
                server, answer, own[number], limits[number], self._special_tokens, version
            )

        self._ahead = key, Flight(self._servers, bodies, read, self._limits.concurrency)

    @property
    def is_ahead(self) -> bool:
        """Whether a rollout was begun that nobody has waited for."""
        return self._ahead is not None

    def give_up(self) -> None:
        """Forget the rollout that was begun, if there is one."""
        if self._ahead is not None:
            self._ahead[1].cancel()
            self._ahead = None

    def generate_together(
        self,
        prompts: Sequence[Prompt],
        max_response_length: int,
        *,
        one_queue: bool,
        cutoff: Cutoff | None = None,
        on_finished: Callable[[Trajectory], None] | None = None,
    ) -> list[Trajectory]:
        """See `TrajectoryEngine`; servers always share one queue.

        Raises:
            UserError: On all ranks: a server does not answer, or not with a response.
            StopRequested: On all ranks.
        """
        assert cutoff is None, "servers finish every response"
        if self._ahead is not None and self._ahead[0] != _key(prompts, max_response_length):
            self.give_up()
        if self._ahead is None:
            self.begin(prompts, max_response_length)
        assert self._ahead is not None
        try:
            trajectories = self._arrived(self._ahead[1])
        finally:
            self.give_up()
        if on_finished is not None:
            for trajectory in trajectories:
                on_finished(trajectory)
        return trajectories

    def settled(self) -> AbstractContextManager[None]:
        """Nothing to do: whatever ends `generate_together` does so on all ranks."""
        return nullcontext()

    def _arrived(self, flight: Flight) -> list[Trajectory]:
        """Wait for a rollout, in step with all ranks, and hand it to those of the replica."""
        with ACTIVITY.working("responses", flight.total) as work:
            while True:
                flight.wait(POLL_SECONDS)
                work.done = flight.done
                ACTIVITY.step()  # a server that hangs has a timeout of its own
                has_failed = flight.error is not None
                if self._stop is None:
                    waits = not flight.has_ended
                else:
                    waits, has_failed = self._stop.agree(not flight.has_ended, has_failed)
                if has_failed or not waits:
                    break
        with errors_on_all_ranks():
            if isinstance(flight.error, UserError):
                raise flight.error
        if flight.error is not None:
            raise flight.error
        if has_failed:
            raise RuntimeError("the rollout of another rank has failed")
        return self._on_all_ranks_of_replica(flight.trajectories())

    def _on_all_ranks_of_replica(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        group = self.groups.model
        if group is None:
            return trajectories
        shared: list[Any] = [trajectories]
        dist.broadcast_object_list(shared, group=group, group_src=0)
        received: list[Trajectory] = shared[0]
        return received


def _key(prompts: Sequence[Prompt], max_response_length: int) -> list[tuple[int, int]]:
    """What tells a rollout from another one: samples and limits of responses."""
    return [(p.sample_index, p.response_limit(max_response_length)) for p in prompts]
