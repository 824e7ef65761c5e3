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

from megatron_dlm import object_exchange
from megatron_dlm.activity import ACTIVITY
from megatron_dlm.errors import UserError
from megatron_dlm.parallel import ParallelGroups, errors_on_all_ranks, from_rank_zero
from megatron_dlm.rollout.cutoff import Cutoff
from megatron_dlm.rollout.external.client import RolloutServer
from megatron_dlm.rollout.external.flight import Flight
from megatron_dlm.rollout.external.replay import Replay
from megatron_dlm.rollout.external.responses import request, trajectory_of
from megatron_dlm.rollout.external.settings import check_settings
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.work import RolloutWork
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.stop_request import StopRequested
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Prompt, Trajectory

POLL_SECONDS = 0.2
"""Between two looks of all ranks at whether a rollout has come, and whether one shall stop."""


_Key = tuple[tuple[int, ...], int]
"""Samples of a rollout, and its longest response."""


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

    def close(self, servers: Sequence[RolloutServer]) -> None:
        """Tell servers that no more weights come; of this rank alone, without errors."""


@dataclass(frozen=True)
class ServerLimits:
    """What a run asks of servers.

    Attributes:
        concurrency: Requests at once, of each replica for each server.
        longest: Tokens of the longest prompt and response, in whole blocks.
        needs_steps: Whether training goes back to the states that decoding visited.
        is_on_policy: Whether responses are of the weights that the student has when they come.
    """

    concurrency: int
    longest: int
    needs_steps: bool
    is_on_policy: bool


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
        replay: Finds the steps at which tokens were kept, of servers that do not say them.
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
        replay: Replay,
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
        self._replay = replay
        self._stop = stop
        self._sent: int | None = None
        self._is_checked = False
        self._replays = False
        self._ahead: tuple[_Key, Flight] | None = None

    def check(self) -> None:
        """Compare every server's settings with the run's, once; all ranks call this.

        Raises:
            UserError: On all ranks: one differs, or a server is not there.
        """
        if not self._is_checked:
            self._replays = from_rank_zero(self._check)
            self._is_checked = True

    def _check(self) -> bool:
        """Whether steps have to be found."""
        replays = False
        for server in self._servers:
            has_steps = check_settings(
                server, self._description, self.generation.temperature, self._limits.longest
            )
            replays |= not has_steps
            if self._limits.needs_steps and not has_steps and not self._limits.is_on_policy:
                raise server.refuse(
                    "does not say at which step a token was kept, the objective trains on the "
                    "states that decoding visited, and the weights that would show them are gone "
                    "when a rollout ahead comes",
                    "choose --max-rollout-staleness 0 or --objective opdlm_off, or take "
                    "megatron-dlm rollout-server",
                )
        return replays and self._limits.is_on_policy

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

    def take_up(self, trajectories: Sequence[Trajectory], max_response_length: int) -> None:
        """Take trajectories for those of a rollout that was begun; all ranks call this.

        Args:
            trajectories: Of all ranks.
            max_response_length: Of that rollout.
        """
        samples = sorted(trajectory.sample_index for trajectory in trajectories)
        by_sample = {trajectory.sample_index: trajectory for trajectory in trajectories}
        own = samples[self.groups.replica :: self.groups.num_replicas]
        flight = Flight.landed([by_sample[sample] for sample in own])
        self._ahead = (tuple(samples), max_response_length), flight

    @property
    def is_ahead(self) -> bool:
        """Whether a rollout was begun that nobody has waited for."""
        return self._ahead is not None

    def ahead(self, *, waits: bool) -> list[Trajectory]:
        """This replica's part of the rollout that was begun, if it has come; all ranks call this.

        Args:
            waits: Wait for it.

        Returns:
            The trajectories, which `generate_together` has later still; none if there is no such
            rollout, it has not come to all ranks, or it failed, as `generate_together` will say.
        """
        if self._ahead is None:
            return []
        flight = self._ahead[1]
        try:
            still, has_failed = self._state(flight)
            while waits and still and not has_failed:
                flight.wait(POLL_SECONDS)
                ACTIVITY.step()
                still, has_failed = self._state(flight)
        except StopRequested:
            return []
        return [] if still or has_failed else flight.trajectories()

    def give_up(self) -> None:
        """Forget the rollout that was begun, if there is one."""
        if self._ahead is not None:
            self._ahead[1].cancel()
            self._ahead = None

    def close(self) -> None:
        """See `AheadEngine`: what is on its way is given up, and servers may forget the run."""
        self.give_up()
        self._weights.close(self._servers)

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
        if self._replays:
            trajectories = self._replay.settled(trajectories)
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
                waits, has_failed = self._state(flight)
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

    def _state(self, flight: Flight) -> tuple[bool, bool]:
        """Whether a rollout is on its way to any rank, and whether it has failed on any.

        Raises:
            StopRequested: On all ranks, if one wants to stop.
        """
        waits, has_failed = not flight.has_ended, flight.error is not None
        return (waits, has_failed) if self._stop is None else self._stop.agree(waits, has_failed)

    def _on_all_ranks_of_replica(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        group = self.groups.model
        return trajectories if group is None else object_exchange.broadcast(trajectories, group)


def _key(prompts: Sequence[Prompt], max_response_length: int) -> _Key:
    """What tells a rollout from another one."""
    return tuple(prompt.sample_index for prompt in prompts), max_response_length
