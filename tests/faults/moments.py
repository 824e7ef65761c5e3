"""Moments of a run at which a process sends itself a signal: a real one, at an exact place."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from megatron_dlm.rollout.batch import DecodingBatch
from megatron_dlm.teacher import frozen, self_teacher
from megatron_dlm.training import loop
from megatron_dlm.training.checkpoint_saving import CheckpointSaver
from megatron_dlm.training.validation import Validation

PLACES: dict[str, tuple[tuple[Any, str], ...]] = {
    "rollout": ((DecodingBatch, "_forward"),),
    "teacher": ((frozen, "forward_hidden"), (self_teacher, "forward_hidden")),
    "update": ((loop, "train_step"),),
    "validation": ((Validation, "loss"),),
    "save": ((CheckpointSaver, "save"),),
}
"""What is called at each of these places of a run."""


@dataclass
class Moment:
    """A call at one of the places.

    Attributes:
        place: Key of `PLACES`.
        call: Number of the call, from 1; 0: none, the calls are only counted.
        number: The signal that the process sends itself as it begins; SIGKILL is one too.
        calls: Calls so far.
    """

    place: str
    call: int = 0
    number: signal.Signals = signal.SIGTERM
    calls: int = 0

    @contextmanager
    def arranged(self) -> Iterator[None]:
        """Have it happen in the block."""
        with ExitStack() as stack:
            for owner, name in PLACES[self.place]:
                counted = self._counted(getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, counted))
            yield

    def _counted(self, original: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.call:
                os.kill(os.getpid(), self.number)
            return original(*args, **kwargs)

        return wrapper
