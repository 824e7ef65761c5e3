"""What student's and teacher's ranks of a job tell each other through the store they met at.

Targets take another way, HTTP: here are only where the teacher is, and how the job ends.
"""

import json
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress

from torch.distributed import Store  # type: ignore[attr-defined] # documented, not listed

from megatron_dlm.activity import ACTIVITY
from megatron_dlm.config import Config
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.teacher.client import TeacherClient
from megatron_dlm.teacher.waiting import wait_for

LEAVE_SECONDS = 10.0
"""How long the student's ranks, one of which may keep the store, wait until the teacher's have
seen the end."""

POLL_SECONDS = 0.1

_PLACE, _END, _STOP, _LEFT = (f"teacher/{name}" for name in ("place", "end", "stop", "left"))


class JobLine:
    """The line between the two sides of a job.

    Args:
        store: Of the whole job.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def publish(self, urls: Sequence[str], key: str) -> None:
        """Say where the teacher's servers are, and the key that they ask for."""
        self._store.set(_PLACE, json.dumps({"urls": list(urls), "key": key}))

    def wait_for_place(self, stop: StopAgreement) -> tuple[list[str], str]:
        """What was published, when the teacher's weights are loaded; all ranks call this.

        Raises:
            StopRequested: On all ranks.
        """
        while stop.agree(not self._store.check([_PLACE]), False)[0]:
            time.sleep(POLL_SECONDS)
            ACTIVITY.step()  # the ranks that load are those to be named if nothing comes
        place = json.loads(self._store.get(_PLACE))
        return place["urls"], place["key"]

    def ask_to_stop(self, code: int) -> None:
        """Let the student's ranks stop: a rank of the teacher was asked to."""
        with suppress(RuntimeError):
            self._store.set(_STOP, str(code))

    def asked_to_stop(self) -> int:
        """What a rank of the teacher was asked to; 0: nothing."""
        return int(self._store.get(_STOP)) if self._store.check([_STOP]) else 0

    def end(self, status: int, teacher_ranks: int) -> None:
        """End the job on the teacher's ranks too, and wait a moment until they know."""
        with suppress(RuntimeError):  # where a rank has died, the store may be gone
            self._store.set(_END, str(status))
            deadline = time.monotonic() + LEAVE_SECONDS
            keys = [f"{_LEFT}/{rank}" for rank in range(teacher_ranks)]
            while not self._store.check(keys) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)

    def ended(self) -> int | None:
        """The status that the student's ranks ended with; None while they run.

        0 where the store is gone with the rank that kept it: had that failed, the watch over all
        ranks, or the launcher, would have ended this one.
        """
        try:
            return int(self._store.get(_END)) if self._store.check([_END]) else None
        except RuntimeError:
            return 0

    def leave(self, rank: int) -> None:
        """Say that a rank of the teacher has seen the end."""
        with suppress(RuntimeError):
            self._store.set(f"{_LEFT}/{rank}", "1")


def ranks_client(config: Config, line: JobLine, stop: StopAgreement) -> TeacherClient:
    """Reaches the teacher's ranks; waits until they have loaded it. All ranks call this.

    Raises:
        UserError: On all ranks: they do not answer.
        StopRequested: On all ranks.
    """
    urls, key = line.wait_for_place(stop)
    client = TeacherClient(
        urls,
        field="--teacher-ranks",
        max_requests=config.teacher.teacher_max_requests,
        timeout_s=config.teacher.teacher_timeout_s,
        key=key,
    )
    asked = client.ask_identity()
    wait_for(asked, stop)
    client.learn_identity(asked)
    return client


def new_key() -> str:
    """A key that nobody else knows."""
    return secrets.token_urlsafe(24)
