"""Wait for what a teacher elsewhere was asked for, on all ranks in step."""

from collections.abc import Callable
from typing import Any

from megatron_dlm.activity import ACTIVITY
from megatron_dlm.errors import UserError
from megatron_dlm.parallel import errors_on_all_ranks
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.teacher.client import POLL_SECONDS, Asked


def wait_for(
    asked: Asked[Any], stop: StopAgreement | None, each: Callable[[], None] | None = None
) -> None:
    """Wait until every rank has its answers: a teacher may take longer than a collective waits.

    Args:
        asked: What this rank waits for; given up where this fails.
        stop: Looked at meanwhile; None: only one rank waits, and nobody asks it to stop.
        each: Called now and then, and at the end.

    Raises:
        UserError: On all ranks: the teacher does not answer one of them, or `each` raised it.
        StopRequested: On all ranks.
    """
    waits, has_failed, error = True, False, None
    try:
        while waits and not has_failed:
            asked.wait(POLL_SECONDS)
            ACTIVITY.step()  # a server that hangs has a timeout of its own
            waits, error = not asked.has_ended, asked.error
            try:
                if each is not None:
                    each()
            except UserError as raised:
                error = raised
            has_failed = error is not None
            if stop is not None:
                waits, has_failed = stop.agree(waits, has_failed)
        with errors_on_all_ranks():
            if error is not None:
                raise error
    finally:
        asked.cancel()
