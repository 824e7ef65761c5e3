"""A rollout on its way: requests in a thread, so that the caller can do other things meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

from megatron_dlm.rollout.external.client import RolloutServer
from megatron_dlm.types.trajectory import Trajectory

Read = Callable[[RolloutServer, int, dict[str, Any]], Trajectory]
"""Makes a trajectory of an answer: the server, the number of the request, the answer."""


class Flight:
    """Requests that servers share: each takes the next one when it has room.

    Args:
        servers: At least one.
        bodies: Of /generate, one for each response.
        read: Makes trajectories of the answers.
        concurrency: Requests at once for each server.
    """

    def __init__(
        self,
        servers: Sequence[RolloutServer],
        bodies: Sequence[dict[str, Any]],
        read: Read,
        concurrency: int,
    ) -> None:
        self._servers = servers
        self._bodies = bodies
        self._read = read
        self._concurrency = concurrency
        self._left = deque(range(len(bodies)))
        self._trajectories: list[Trajectory | None] = [None] * len(bodies)
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._cancelled = threading.Event()
        self._ended = threading.Event()
        self.done = 0
        if bodies:
            threading.Thread(target=self._run, name="rollout", daemon=True).start()
        else:
            self._ended.set()

    @classmethod
    def landed(cls, trajectories: Sequence[Trajectory]) -> Flight:
        """One that has ended with these."""
        flight = cls([], [], lambda *_: None, 0)  # type: ignore[arg-type]
        flight._trajectories = list(trajectories)
        flight.done = len(trajectories)
        return flight

    @property
    def total(self) -> int:
        """Responses that were asked for."""
        return len(self._trajectories)

    @property
    def has_ended(self) -> bool:
        """Whether all have come, or one never will."""
        return self._ended.is_set()

    @property
    def error(self) -> BaseException | None:
        """Why one never will."""
        return self._error

    def wait(self, seconds: float) -> None:
        """Wait for the end, but not for longer."""
        self._ended.wait(seconds)

    def cancel(self) -> None:
        """Give up what has not come: servers see their connections closed. Waits for the thread."""
        self._cancelled.set()
        loop, task = self._loop, self._task
        if loop is not None and task is not None and not self.has_ended:
            loop.call_soon_threadsafe(task.cancel)
        self._ended.wait(10)

    def trajectories(self) -> list[Trajectory]:
        """All of them, in the order of the requests; after the end."""
        return [trajectory for trajectory in self._trajectories if trajectory is not None]

    def _run(self) -> None:
        try:
            asyncio.run(self._decode())
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # raised again where the result is waited for
            self._error = error
        finally:
            self._ended.set()

    async def _decode(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        if self._cancelled.is_set():
            return
        async with AsyncExitStack() as stack:
            lanes = []
            for server in self._servers:
                client = await stack.enter_async_context(server.open_client(self._concurrency))
                lanes += [(server, client)] * self._concurrency
            # Each server's lanes side by side, so that few requests are spread over all servers.
            count = self._concurrency
            ordered = [
                lanes[s * count + i] for i in range(count) for s in range(len(self._servers))
            ]
            try:
                async with asyncio.TaskGroup() as group:
                    for server, client in ordered[: len(self._bodies)]:
                        group.create_task(self._lane(server, client))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None

    async def _lane(self, server: RolloutServer, client: Any) -> None:
        while self._left:
            number = self._left.popleft()
            answer = await server.decode(client, self._bodies[number])
            self._trajectories[number] = self._read(server, number, answer)
            self.done += 1
