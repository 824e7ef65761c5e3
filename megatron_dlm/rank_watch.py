"""Ranks watch each other: one that dies ends the others in seconds, one that stalls is named.

Every rank keeps a connection to rank 0. The kernel closes it when the process at its other end dies
and gives it up when the host does not answer: a rank that computes for minutes without a word, even
without letting go of Python's interpreter, is not taken for dead. Over the connection each rank
says every few seconds what it does; rank 0 compares, and names who holds the others up.
"""

import contextlib
import faulthandler
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from torch.distributed import DistNetworkError, Store  # type: ignore[attr-defined] # not listed

from megatron_dlm.activity import ACTIVITY, SAVE, START
from megatron_dlm.entry import USER_ERROR_STATUS
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.launcher import leave_error
from megatron_dlm.terminal import end_standard_output, say

BEAT_SECONDS = 2.0
"""Between two reports of a rank."""

KEEPALIVE_SECONDS = 5
"""A connection without traffic is probed after this long, and given up after the third probe."""

CONNECT_SECONDS = 30.0
"""How long a rank tries to reach rank 0."""

GRACE_SECONDS = 3.0
"""How long a rank that fails waits for news of another one, whose death may be the reason; and how
long the others have to come to the same error by themselves."""

DEATH_STATUS = 1

_UNTIMED = (START, SAVE)
"""Phases whose length hangs on a disk: who is slow there is named, but not ended. Collectives that
wait for it still have their own limit."""

_WAITING_IN = (
    "torch/distributed/",
    "megatron/core/pipeline_parallel/p2p_communication.py",
    "megatron/core/distributed/param_and_grad_buffer.py",
)
"""Code that waits for other ranks."""

_KEY = "rank_watch"
_STARTED = "started"


@dataclass
class RankState:
    """What rank 0 knows of a rank.

    Attributes:
        rank: Global.
        host: Where it runs.
        pid: Its process.
        phase: See `Activity`.
        steps: See `Activity`.
        idle: Seconds since its last step, when it last reported.
        waits_in: Name of the collective that its main thread waits in, None elsewhere.
        stack: Of its main thread, once it has been idle for long.
        seen: When it last reported, on this process's monotonic clock.
        error: The user error that it left with.
    """

    rank: int
    host: str = ""
    pid: int = 0
    phase: str = START
    steps: int = 0
    idle: float = 0.0
    waits_in: str | None = None
    stack: str = ""
    seen: float = field(default_factory=time.monotonic)
    error: str = ""

    @property
    def name(self) -> str:
        """For people."""
        return f"rank {self.rank} on {self.host} (process {self.pid}, phase {self.phase})"

    def silence(self) -> float:
        """Seconds since its last report."""
        return time.monotonic() - self.seen

    def idle_now(self) -> float:
        """Seconds since its last step."""
        return self.idle + self.silence()


def stalled(states: list[RankState], seconds: float) -> list[RankState]:
    """The ranks that hold the others up, if any rank has not come forward for so long.

    Those that do not even report, else those that do not wait for others in a collective. Where
    that tells nothing, as waiting for a device looks like work, those that have come least far.
    """
    idle = [state for state in states if state.idle_now() >= seconds]
    if not idle:
        return []
    silent = [state for state in idle if state.silence() >= max(3 * BEAT_SECONDS, seconds / 2)]
    busy = [state for state in idle if state.waits_in is None]
    guilty = silent or busy or idle
    if len(guilty) < len(states):
        return guilty
    fewest = min(state.steps for state in guilty)
    return [state for state in guilty if state.steps == fewest]


class RankWatch:
    """Watches the ranks of a job for the time of a `with` block.

    Args:
        store: Of this attempt; where rank 0 is found.
        next_store: Of the attempt after this one, which ranks of another node may be in already.
        rank: Own.
        world_size: Number of ranks.
        address: Host that rank 0 is reached at.
        stall_seconds: Without progress for so long, a rank is named.
        limit_seconds: Without progress for so long, the run ends.
    """

    def __init__(
        self,
        store: Store,
        next_store: Store,
        *,
        rank: int,
        world_size: int,
        address: str,
        stall_seconds: float,
        limit_seconds: float,
    ) -> None:
        self._store, self._next_store = store, next_store
        self._rank, self._world_size, self._address = rank, world_size, address
        self._stall_seconds, self._limit_seconds = stall_seconds, limit_seconds
        self._states = {0: RankState(0)}
        self._named: set[int] = set()
        self._left: dict[int, float] = {}
        self._selector = selectors.DefaultSelector()
        self._links: dict[int, _Link] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank watch", daemon=True)

    def __enter__(self) -> "RankWatch":
        """Connect all ranks; returns once they are.

        Raises:
            UserError: Some did not start in time, or cannot be reached.
        """
        deadline = time.monotonic() + self._limit_seconds
        try:
            self._store.set(_STARTED, "1")
            self._store.set(f"{_STARTED}/{self._rank}", "1")
            if self._rank == 0:
                self._accept_all(deadline)
            else:
                self._connect(deadline)
        except DistNetworkError:
            self._end("the process that keeps the store of the ranks died", DEATH_STATUS)
        ACTIVITY.step()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """`leave`."""
        self.leave(error)

    def leave(self, error: BaseException | None = None) -> None:
        """Stop watching, and tell the others why if it is for an error; once."""
        if self._stop.is_set():
            return
        reason: dict[str, Any] = {"left": None}
        if isinstance(error, UserError):
            reason = {"left": str(error)}
        elif isinstance(error, Exception):
            # Of a rank that died, collectives often know first. Its name is the better message.
            time.sleep(GRACE_SECONDS)
            text = str(error).strip().splitlines() or [""]
            reason = {"failed": f"{type(error).__name__}: {text[0]}"}
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        for link in self._links.values():
            link.send(reason)
            link.close()
        self._selector.close()

    def _accept_all(self, deadline: float) -> None:
        token = secrets.token_hex(16)
        is_here = self._address in ("localhost", "127.0.0.1", "::1")
        if not is_here and socket.has_dualstack_ipv6():
            listener = socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=self._world_size
            )
        else:
            listener = socket.create_server(
                ("127.0.0.1" if is_here else "", 0), backlog=self._world_size
            )
        with listener:
            listener.settimeout(0.5)
            place = {"port": listener.getsockname()[1], "token": token, "here": is_here}
            self._store.set(_KEY, json.dumps(place))
            while len(self._links) < self._world_size - 1:
                self._check_start(deadline)
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                link = _Link(connection)
                hello = link.first_message()
                if hello.get("token") != token or hello.get("rank") in self._links:
                    link.close()  # no rank of this job
                    continue
                rank = int(hello["rank"])
                self._states[rank] = RankState(rank, str(hello["host"]), int(hello["pid"]))
                self._links[rank] = link
                self._selector.register(connection, selectors.EVENT_READ, rank)

    def _connect(self, deadline: float) -> None:
        while not self._store.check([_KEY]):
            self._check_start(deadline)
            time.sleep(0.1)
        place = json.loads(self._store.get(_KEY))
        address = ("127.0.0.1" if place["here"] else self._address, place["port"])
        last_try = time.monotonic() + CONNECT_SECONDS
        while True:
            try:
                connection = socket.create_connection(address, timeout=CONNECT_SECONDS)
                break
            except OSError as error:
                self._check_start(deadline)  # rank 0 may have died meanwhile
                if time.monotonic() > last_try:
                    raise bad_value(
                        "MASTER_ADDR",
                        self._address,
                        f"rank {self._rank} cannot reach rank 0 at port {address[1]} ({error})",
                        "let processes of the job reach each other, or add --no-watch-ranks",
                    ) from error
                time.sleep(0.5)
        link = _Link(connection)
        link.send({"token": place["token"], "rank": self._rank, **_this_process()})
        self._links[0] = link
        self._selector.register(connection, selectors.EVENT_READ, 0)

    def _check_start(self, deadline: float) -> None:
        """End where a rank has started again or not at all."""
        if self._next_store.check([_STARTED]):
            self._end("ranks of another node have been started again", DEATH_STATUS)
        if time.monotonic() > deadline:
            missing = [
                str(rank)
                for rank in range(self._world_size)
                if not self._store.check([f"{_STARTED}/{rank}"])
            ]
            raise bad_value(
                "WORLD_SIZE",
                self._world_size,
                f"ranks {', '.join(missing[:8])} have not started in "
                f"{self._limit_seconds / 60:g} minutes",
                "look at their logs, or raise --distributed-timeout-minutes",
            )

    def _run(self) -> None:
        """Report, listen and compare, until told to stop."""
        next_beat, phase = 0.0, ""
        while not self._stop.is_set():
            for key, _ in self._selector.select(timeout=BEAT_SECONDS / 4):
                self._receive(key.data)
            self._check_left()
            if time.monotonic() < next_beat and ACTIVITY.phase == phase:
                continue
            phase = ACTIVITY.phase
            next_beat = time.monotonic() + BEAT_SECONDS
            # Where the interpreter is held, this thread cannot tell; a thread of C's can.
            faulthandler.dump_traceback_later(self._stall_seconds + 2 * BEAT_SECONDS, file=2)
            state = _own_state(self._stall_seconds)
            if self._rank == 0:
                self._update(0, {**state, **_this_process()})
                for link in self._links.values():
                    link.send({"phase": state["phase"], **_this_process()})
                self._name_stalled(list(self._states.values()))
            else:
                for link in self._links.values():
                    link.send(state)
                    self._watch_rank_zero()

    def _receive(self, rank: int) -> None:
        link = self._links[rank]
        messages, is_open = link.receive()
        for message in messages:
            if "end" in message:
                self._end(message["end"], message["status"], is_told=True)
            elif "failed" in message:
                self._end(f"{self._states[rank].name} failed: {message['failed']}", DEATH_STATUS)
            elif "left" in message:
                self._forget(rank)
                if message["left"] is not None:
                    self._left[rank] = time.monotonic()
                    self._states[rank].error = message["left"]
                return
            else:
                self._update(rank, message)
        if not is_open:
            self._forget(rank)
            self._end(f"{self._states[rank].name} died", DEATH_STATUS)

    def _update(self, rank: int, state: dict[str, Any]) -> None:
        known = self._states[rank]
        for name, value in state.items():
            setattr(known, name, value)
        known.seen = time.monotonic()

    def _forget(self, rank: int) -> None:
        self._selector.unregister(self._links[rank].connection)
        self._links.pop(rank).close()

    def _check_left(self) -> None:
        """End where another rank had an error that this one does not come to by itself."""
        for rank, when in self._left.items():
            if time.monotonic() - when > GRACE_SECONDS:
                # Rank 0 has told of its own.
                self._end(self._states[rank].error, USER_ERROR_STATUS, is_told=self._rank != 0)

    def _watch_rank_zero(self) -> None:
        """It cannot name itself where its process or its interpreter is held."""
        state = self._states[0]
        if state.silence() >= self._stall_seconds:
            state.idle = 0.0
            self._name_stalled([state])

    def _name_stalled(self, states: list[RankState]) -> None:
        """Say who holds the others up, once each, and end the run where the limit is reached."""
        guilty = stalled(states, self._stall_seconds)
        if not guilty:
            self._named.clear()
            return
        is_over = any(s.idle_now() >= self._limit_seconds for s in guilty)
        is_over = is_over and all(s.phase not in _UNTIMED for s in states)
        if {s.rank for s in guilty} <= self._named and not is_over:
            return
        self._named |= {s.rank for s in guilty}
        lines = []
        for state in guilty[:8]:
            where = f", waits in {state.waits_in}" if state.waits_in else ""
            if state.silence() > 3 * BEAT_SECONDS:
                where = ", its process is there but held"
            lines.append(f"{state.name}: no progress for {state.idle_now():.0f} s{where}")
        waiting = sum(s.waits_in is not None for s in states)
        if waiting:
            lines.append(f"{waiting} of {self._world_size} ranks wait for others")
        text = "; ".join(lines)
        stacks = [f"main thread of rank {s.rank}:\n{s.stack}" for s in guilty[:2] if s.stack]
        if is_over:
            self._end("\n".join([text, *stacks]), DEATH_STATUS)
        if self._speaks:
            say("\n".join([f"warning: {text}", *stacks]), error=True)

    @property
    def _speaks(self) -> bool:
        """Rank 0, and rank 1 of rank 0."""
        return self._rank <= 1

    def _end(self, text: str, status: int, *, is_told: bool = False) -> None:
        """End this process and, from rank 0, all others; one of them says why."""
        if self._stop.is_set():
            return  # this rank is leaving by itself
        for link in self._links.values():
            link.send({"end": text, "status": status})
        if self._speaks and not is_told:
            say(f"error: {text}", error=True)
        # A death is no reason not to start again.
        leave_error(f"error: {text}", None if status == DEATH_STATUS else status)
        end_standard_output()
        os._exit(status)


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _own_state(stall_seconds: float) -> dict[str, Any]:
    """What this process reports."""
    idle = ACTIVITY.idle_seconds
    state: dict[str, Any] = {"phase": ACTIVITY.phase, "steps": ACTIVITY.steps, "idle": idle}
    main = sys._current_frames().get(threading.main_thread().ident or 0)
    state["waits_in"] = None if main is None else _collective(main)
    state["stack"] = ""
    if main is not None and idle >= stall_seconds / 2:
        state["stack"] = "".join(traceback.format_stack(main)[-12:])
    return state


def _collective(frame: FrameType | None) -> str | None:
    """Name of the innermost function that waits for other ranks, None if none does."""
    for _ in range(6):  # its own helpers and wrappers
        if frame is None:
            return None
        code = frame.f_code
        if any(part in Path(code.co_filename).as_posix() for part in _WAITING_IN):
            return code.co_name
        frame = frame.f_back
    return None


class _Link:
    """A connection that carries JSON, one object a line."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._rest = b""
        connection.settimeout(10.0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for name, value in (
            ("TCP_KEEPIDLE", KEEPALIVE_SECONDS),
            ("TCP_KEEPINTVL", KEEPALIVE_SECONDS),
            ("TCP_KEEPCNT", 3),
            ("TCP_USER_TIMEOUT", 4000 * KEEPALIVE_SECONDS),
        ):
            if hasattr(socket, name):  # Linux has them all
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: dict[str, Any]) -> None:
        """Send, if the other end still takes it: `receive` tells where it does not."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """What has arrived, and whether the other end is open; call it when there is something."""
        try:
            data = self.connection.recv(65536)
        except OSError:
            data = b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines], bool(data)

    def first_message(self) -> dict[str, Any]:
        """The first message of a stranger; empty if it is none."""
        try:
            while True:
                messages, is_open = self.receive()
                if messages:
                    return messages[0] if isinstance(messages[0], dict) else {}
                if not is_open or len(self._rest) > 4096:
                    return {}
        except ValueError:
            return {}

    def close(self) -> None:
        """Close it."""
        self.connection.close()
